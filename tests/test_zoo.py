"""Real models of many makers: each ends in a valid, smaller file, or in a sentence that says why.

Opsets 2 to 20, half precision, quantized already, LSTM and GRU, If, Loop and Scan, 1-D and 3-D
tensors, tree ensembles; fed with made-up data of the shapes that the manifest lists.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from corpora import interface
from numpy.typing import NDArray
from zoo import REFUSED, SLOW, ZOO, data, entries

from onnxc.api import quantize
from onnxc.errors import OnnxcError
from onnxc.quantization import QuantizeSettings
from onnxc.report import Report
from onnxc.runtime import run, session

WITHOUT_WEIGHTS = {  # tree ensembles, products written as loops, weights made by ConstantOfShape
    *("ad01_loops_op19", "light_inception_v2"),
    *("lightgbm_onnxmltools", "mlnet_pipeline", "sklearn_randomforest"),
}
ALL_INTEGER = {  # static quantization puts every heavy node in an integer kernel
    *("bodypix_mbv1_050_s16", "deeplabv3_257_tf", "espcn_nnresize_opset2", "espcn_subpixel"),
    *("fastestdet_ppp", "mlperftiny_ic_resnet8", "squeezenet_fp16_winml"),
    *("super_resolution_10", "winml_imageclassifier", "yunet_120x160"),
}
SMALLEST = 1024  # bytes of a weight that is worth its scales
HEAVY = ("Conv", "Gemm", "MatMul", "LSTM", "GRU")  # parts of the names of operators
EXPANDING = ("DequantizeLinear", "Mul", "Cast", "Transpose", "Reshape")


def _models() -> list[Any]:
    marks = {True: [pytest.mark.slow], False: []}
    found = [pytest.param(e, id=e["name"], marks=marks[e["name"] in SLOW]) for e in entries()]
    return found or [pytest.param({}, id="none")]


@pytest.mark.parametrize("entry", _models())
def test_zoo(entry: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    name, source = entry["name"], ZOO / f"{entry['name']}.onnx"
    output = tmp_path / "out.onnx"
    if name in REFUSED:
        with pytest.raises(OnnxcError, match=re.escape(REFUSED[name])) as caught:
            quantize(source, data=data(entry), output=output)
        assert len(str(caught.value).splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
        return
    settings = QuantizeSettings(format="qdq" if name in ALL_INTEGER else "auto")
    report = quantize(source, data=data(entry), output=output, settings=settings)
    _check_file(source, output, entry)
    if name in WITHOUT_WEIGHTS:
        assert not _weights(onnx.load(source))
    else:
        _check_quantized(source, output, report)
    if name in ALL_INTEGER:
        assert report.coverage is not None
        assert report.coverage.integer == report.coverage.total > 0


def _check_file(source: Path, output: Path, entry: dict[str, Any]) -> None:
    """Valid, runnable, and with the interface of the original."""
    onnx.checker.check_model(str(output), full_check=False)
    before, after = onnx.load(source), onnx.load(output)
    assert interface(before) == interface(after)
    feed = {key: np.asarray(value[0]) for key, value in (data(entry) or {}).items()}
    reference, made = run(session(source), feed), run(session(output), feed)
    for name, value in reference.items():
        if isinstance(value, np.ndarray):
            assert (made[name].shape, made[name].dtype) == (value.shape, value.dtype)


def _check_quantized(source: Path, output: Path, report: Report) -> None:
    """Smaller, and next to none of the bytes of heavy weights in float."""
    assert report.after.bytes < report.before.bytes
    sizes: Counter[str] = Counter()
    for weight in _weights(onnx.load(output)):
        sizes["integer" if weight.dtype.itemsize == 1 else "float"] += weight.nbytes
    assert sizes["integer"] > 0
    assert sizes["float"] < 0.05 * 4 * sizes["integer"]
    assert report.comparison is not None
    assert np.isfinite(report.comparison.sqnr)


def _weights(proto: onnx.ModelProto) -> list[NDArray[Any]]:
    """Constants of two axes or more that heavy nodes multiply by, nested bodies included."""
    found = {id(t): t for graph in _graphs(proto.graph) for t in _read_by_heavy(graph, proto.graph)}
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in found.values()]
    return [array for array in arrays if array.nbytes >= SMALLEST / 4 * array.dtype.itemsize]


def _read_by_heavy(graph: onnx.GraphProto, outer: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Weights at positions 1 and 2, behind what turns integers into them or not."""
    known = {t.name: t for g in (outer, graph) for t in g.initializer}
    makers = {o: n for g in (outer, graph) for n in g.node for o in n.output}
    known |= {o: n.attribute[0].t for o, n in makers.items() if n.op_type == "Constant"}
    for node in graph.node:
        if not any(op in node.op_type for op in HEAVY):
            continue
        for name in node.input[1:3]:
            while name in makers and makers[name].op_type in EXPANDING:
                name = makers[name].input[0]
            if name in known and len(known[name].dims) >= 2:
                yield known[name]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
