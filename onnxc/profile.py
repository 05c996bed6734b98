"""Where the time of a model goes: milliseconds of each node, from ONNX Runtime's own profile.

The runtime fuses nodes and names what it makes after one of them, or after a tensor: a convolution
with the Clip behind it is called like the Clip's output. The time of such a kernel goes to the
heavy node in it, which is found from that name backwards.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import onnx_graphsurgeon as gs

from onnxc.bench import Length
from onnxc.files import TemporaryFolder
from onnxc.graph import Model, runnable
from onnxc.ops import knowledge
from onnxc.runtime import Runtime, run, session

LENGTH = Length(repeats=12, max_time=5.0, least=3)
KERNEL = "_kernel_time"
ADDED = re.compile(r"(_nchwc|_token_\d+|_quant|_fused)+$")  # what the runtime appends to names
HEAVY = re.compile(r"(Conv|ConvTranspose|Gemm|MatMul|LSTM|GRU)\w*$")
NEAR = 4  # nodes that a fused kernel takes in, at most


def node_times(
    model: Model, feed: Mapping[str, Any], runtime: Runtime = Runtime(), length: Length = LENGTH
) -> dict[str, float]:
    """Milliseconds of each node in a run on `feed`, the median of some rounds.

    Kernels that belong to no node, such as changes of the memory layout, are under "". Raises
    ModelError when the model cannot be run.
    """
    with TemporaryFolder() as folder, runnable(model) as source:
        opened = session(source, runtime, profile=Path(folder) / "times")
        start = time.perf_counter()
        for count in itertools.count():
            if length.is_over(count, count, time.perf_counter() - start):
                break
            run(opened, dict(feed))
        events = json.loads(Path(opened.end_profiling()).read_text())
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            name = event["name"].removesuffix(KERNEL)
            found[name, event["args"]["op_name"]].append(event["dur"] / 1000)
    return _by_node(model.graph, {key: median(times) for key, times in found.items()})


def _by_node(graph: gs.Graph, kernels: Mapping[tuple[str, str], float]) -> dict[str, float]:
    nodes = {node.name: node for node in graph.nodes}
    makers = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
    times: dict[str, float] = defaultdict(float)
    for (name, op), milliseconds in kernels.items():
        bare = ADDED.sub("", name)
        node = nodes.get(name) or nodes.get(bare) or makers.get(bare)
        if node is not None and HEAVY.search(op):
            node = _heavy(node)
        times["" if node is None else node.name] += milliseconds
    return dict(times)


def _heavy(node: gs.Node) -> gs.Node | None:
    """The first node with a weight, from this one backwards."""
    for _ in range(NEAR):
        if knowledge(node).window is not None or HEAVY.search(node.op):
            return node
        makers = [t.inputs[0] for t in node.inputs if t.inputs]
        if not makers:
            return None
        node = makers[0]
    return None
