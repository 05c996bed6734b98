"""Layers of every kind with inputs that hang together, for tests of passes that rewrite weights."""

from __future__ import annotations

import numpy as np
import onnx
from quantizing import Feed
from texts import bind, normal

IMAGES: Feed = {"x": np.abs(normal(48, 1, 8, 9, 9)) + normal(48, 1, 8, 1, 1)}
VECTORS: Feed = {"x": normal(200, 1, 16) @ normal(16, 16) + np.float32(1)}

CONV = """g (float[1,8,9,9] x, float[6,{i},3,3] W, float[6] B) => (float[1,6,7,7] y) {{
    y = Conv {a} (x, W, B) }}"""
COMMON: dict[str, tuple[onnx.ModelProto, Feed]] = {
    "Conv": (bind(CONV.format(i=8, a=""), W=normal(6, 8, 3, 3), B=normal(6)), IMAGES),
    "grouped Conv": (
        bind(CONV.format(i=4, a="<group: int = 2>"), W=normal(6, 4, 3, 3), B=normal(6)),
        IMAGES,
    ),
    "ConvTranspose": (
        bind(
            """g (float[1,32,4,4] x, float[32,3,2,2] W) => (float[1,6,8,8] y) {
            y = ConvTranspose <group: int = 2, strides: ints = [2,2]> (x, W) }""",
            W=normal(32, 3, 2, 2),
        ),
        {"x": np.einsum("nbchw,cd->nbdhw", normal(48, 1, 32, 4, 4), normal(32, 32))},
    ),
    "GRU": (
        bind(
            """g (float[4,N,16] x, float[2,9,16] W, float[2,9,3] R) => (float[4,2,N,3] y) {
            y = GRU <hidden_size: int = 3, direction: string = "bidirectional"> (x, W, R) }""",
            W=normal(2, 9, 16) / 4,
            R=normal(2, 9, 3),
        ),
        {"x": normal(4, 50, 16) @ normal(16, 16) / 4},
    ),
}


def named(
    layers: dict[str, tuple[onnx.ModelProto, Feed]],
) -> dict[str, tuple[onnx.ModelProto, Feed]]:
    """The common layers and these; the first node of each is called layer."""
    found = {**COMMON, **layers}
    for proto, _ in found.values():
        proto.graph.node[0].name = "layer"
    return found
