"""Fifty real models of many makers beside the repository, with made-up samples that fit them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SHARED
from corpora import VARIANTS, Subject, judge
from numpy.typing import NDArray
from outcomes import Outcome

from onnxc.runtime import dtype_of, session

ZOO = SHARED / "models" / "zoo"
SAMPLES = 4
CORPUS = "zoo"
REFUSED = {  # a part of the sentence that says why
    "deformconv_19": "does not run on the data",
    "gnn_policy": "ONNX Runtime refuses the model",
    "micro_kws_qdq": "is already quantized (qdq); it is left alone",
    "mlperftiny_ad_int8": "is already quantized (qdq); it is left alone",
    "mlperftiny_kws_int8_qdq": "is already quantized (qdq); it is left alone",
    "mlperftiny_strmww_int8": "is already quantized (qdq); it is left alone",
    "nested_if_loop_scan": "ONNX Runtime refuses the model",
    "pipeline_vectorize": "input 'float_input' is a map",
}
SLOW = {  # too slow for the quick suite
    *("blazeface_front", "espcn_nnresize_opset2"),
    *("ad01_loops_op19", "agllnet_lowlight_256", "dnsmos_p835", "gtcrn_stream_simple"),
    *("hand_landmark", "light_inception_v2", "light_person_detector", "light_shufflenet"),
    *("nanodet_m_320", "pan_mbv3s_seg_simplified", "person_reid_0248", "protocol_transformer"),
    *("selfie_seg_landscape", "style_mosaic", "super_resolution_10", "tbefn_lowlight_180x320"),
    *("ultraface_rfb320", "ultraface_rfb320_ortzoo", "yunet_n_320"),
}


def entries() -> list[dict[str, Any]]:
    """What the manifest says of each model; nothing where there is no zoo."""
    manifest = ZOO / "manifest.json"
    found: list[dict[str, Any]] = json.loads(manifest.read_text()) if manifest.is_file() else []
    return found


def quick() -> list[dict[str, Any]]:
    """Those that commands work on, and not for long."""
    return [entry for entry in entries() if entry["name"] not in (*SLOW, *REFUSED)]


def with_options(
    turn: int, models: Sequence[dict[str, Any]], folder: Path, count: int = 2
) -> Iterator[Outcome]:
    """A command with options on some models, each turn on others, so that all kinds meet."""
    for index in range(turn, turn + len(models), len(models) // count)[:count]:
        own = folder / str(index)
        own.mkdir()
        found = judge(subject(models[index % len(models)], folder), VARIANTS[turn], own)
        yield found._replace(corpus=f"{CORPUS}, with options")


def subject(entry: dict[str, Any], folder: Path) -> Subject:
    """A model as commands take it, its samples in a file of the folder."""
    name, samples = entry["name"], data(entry)
    model = ZOO / f"{name}.onnx"
    if samples is None:
        return Subject(CORPUS, name, model)
    file = folder / f"{name}.npz"
    texts = {n: x.astype("U") if x.dtype.hasobject else x for n, x in samples.items()}
    np.savez(file, **texts)
    return Subject(CORPUS, name, model, file, {n: x[0] for n, x in samples.items()})


def data(entry: dict[str, Any], samples: int = SAMPLES) -> dict[str, NDArray[Any]] | None:
    """Made-up samples by input name; None, for data that onnxc makes up, without known shapes."""
    shapes = entry.get("test_input_shapes")
    if shapes is None:
        return None
    random = np.random.default_rng(0)
    ports = session(ZOO / f"{entry['name']}.onnx").get_inputs()
    return {
        p.name: _drawn(p.name, dtype_of(p.type), (samples, *shapes[p.name]), random) for p in ports
    }


def _drawn(
    name: str, kind: np.dtype[Any] | None, shape: tuple[int, ...], random: np.random.Generator
) -> NDArray[Any]:
    assert kind is not None
    if name == "sr":
        return np.full(shape, 16000, kind)
    if kind.kind == "f":
        return random.random(shape, np.float32).astype(kind)
    if kind.hasobject:
        return np.full(shape, "1", object)
    return random.integers(0, 2, shape).astype(kind)
