"""Graphs of many nodes: no recursion, and time that grows as the number of nodes does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import NodeProto, TensorProto, helper
from texts import context

from onnxc import edit
from onnxc.edit import (
    clone,
    first_of,
    gathering,
    insert,
    replace_uses,
    store,
    uncollected,
    walk,
)
from onnxc.graph import Model, load, save, to_bytes
from onnxc.pipeline import Step, apply_pass, prepare
from passes.quantize_weights import QuantizeWeights

FEED = {"x": np.ones((1, 4), np.float32)}
GROWTH = 3.2  # of the time when a graph doubles: 2, and what else the machine does
ATTEMPTS = 3


def proto(nodes: list[NodeProto], *weights: TensorProto) -> onnx.ModelProto:
    """A model from x to y."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def chain(count: int, op: str, *others: str, every: int = 1) -> list[NodeProto]:
    """Nodes one behind the other; each `every`th of the operator, Relu between."""
    names = ["x", *(f"t{i}" for i in range(1, count)), "y"]
    return [
        helper.make_node(op, [names[i], *others], [names[i + 1]])
        if i % every == 0
        else helper.make_node("Relu", [names[i]], [names[i + 1]])
        for i in range(count)
    ]


def weight(name: str, *shape: int) -> TensorProto:
    array = np.eye(*shape, dtype=np.float32) if len(shape) == 2 else np.full(shape, 1e-3, "f4")
    return onnx.numpy_helper.from_array(array, name)


def products(count: int) -> onnx.ModelProto:
    """MatMul with a weight of its own in each fiftieth node."""
    nodes = chain(count, "MatMul", "w", every=50)
    heavy = [node for node in nodes if node.op_type == "MatMul"]
    for index, node in enumerate(heavy):
        node.input[1] = f"w{index}"
    draw = np.random.default_rng(0)
    arrays = (np.eye(4) + 0.01 * draw.standard_normal((4, 4)) for _ in heavy)
    named = enumerate(a.astype(np.float32) for a in arrays)
    return proto(nodes, *(onnx.numpy_helper.from_array(a, f"w{i}") for i, a in named))


def branches(count: int) -> onnx.ModelProto:
    made = [f"t{i}" for i in range(count)]
    nodes = [helper.make_node("Relu", ["x"], [name]) for name in made]
    return proto([*nodes, helper.make_node("Sum", made, ["y"])])


SHAPES: dict[str, Callable[[int], onnx.ModelProto]] = {
    "Relu and Add": lambda n: proto(chain(n, "Add", "b", every=2), weight("b", 4)),
    "Identity": lambda n: proto(chain(n, "Identity")),
    "MatMul": products,
    "one weight": lambda n: proto(chain(n, "MatMul", "w"), weight("w", 4, 4)),
    "one tensor": lambda n: proto(chain(n, "Add", "x")),
    "branches": branches,
}


def compressed(model: onnx.ModelProto, path: Path) -> tuple[Model, Step]:
    """Load, prepare, quantize and save, each step checked as a command does."""
    path.with_suffix(".in.onnx").write_bytes(model.SerializeToString())
    loaded = load(path.with_suffix(".in.onnx"))
    last = prepare(loaded, FEED)[-1].after
    done = apply_pass(loaded, QuantizeWeights(smallest=64), context(loaded), FEED, last)
    save(loaded, path)
    return loaded, done


def seconds(model: onnx.ModelProto, path: Path) -> float:
    start = time.process_time()
    compressed(model, path)
    return time.process_time() - start


def check_growth(name: str, count: int, tmp_path: Path) -> None:
    """Twice the nodes take about twice the time, in the best of some attempts."""
    small, large = SHAPES[name](count), SHAPES[name](2 * count)
    seconds(SHAPES[name](10), tmp_path / "warm.onnx")
    found = []
    for _ in range(ATTEMPTS):
        found.append(seconds(large, tmp_path / "b.onnx") / seconds(small, tmp_path / "a.onnx"))
        if found[-1] < GROWTH:
            return
    pytest.fail(f"twice the nodes take {min(found):.1f} times as long")


def test_time_grows_as_a_chain_does(tmp_path: Path) -> None:
    check_growth("MatMul", 2_500, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_time_grows_as_graphs_do(name: str, tmp_path: Path) -> None:
    check_growth(name, 5_000, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_hundred_thousand_nodes(name: str, tmp_path: Path) -> None:
    model = SHAPES[name](100_000)
    before = load(model)
    loaded, done = compressed(model, tmp_path / "out.onnx")
    assert not done.problems
    assert len(done.changes) == {"MatMul": 2_000}.get(name, 0) or name == "one weight"
    again = load(tmp_path / "out.onnx")
    assert len(again.graph.nodes) == len(loaded.graph.nodes)
    assert [t.name for t in again.graph.inputs] == [t.name for t in before.graph.inputs]


def test_many_insertions_are_placed_in_one_sweep() -> None:
    graph = load(proto(chain(3, "Relu"))).graph
    first, second, third = graph.nodes

    def made(name: str) -> gs.Node:
        return gs.Node("Relu", name, {}, [], [])

    with gathering(graph):
        insert(graph, before={second.name: [made("a")]})
        insert(graph, before={second.name: [made("b")]}, after={second.name: [made("d")]})
        insert(graph, after={second.name: [made("c")]})
        assert graph.nodes == [first, second, third]
        insert(graph, before={"a": [made("z")]})  # beside one that was only noted
        assert "a" in [node.name for node in graph.nodes]
    names = [node.name for node in graph.nodes]
    assert names == [first.name, "z", "a", "b", second.name, "c", "d", third.name]


def test_weights_are_quantized_in_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweeps = load(products(500)), []
    prepare(model, FEED)
    sweep = edit._sweep
    monkeypatch.setattr(edit, "_sweep", lambda *given: sweeps.append(1) or sweep(*given))
    results = QuantizeWeights(smallest=64).apply(model.graph, context(model))
    assert len(results) == 10 and len(sweeps) == 1


def test_insertions_that_an_error_cut_short_are_dropped() -> None:
    graph = load(proto(chain(2, "Relu"))).graph
    before = list(graph.nodes)
    with pytest.raises(KeyboardInterrupt), gathering(graph):
        insert(graph, before={before[0].name: [gs.Node("Relu", "a", {}, [], [])]})
        raise KeyboardInterrupt
    assert graph.nodes == before
    insert(graph, before={before[0].name: [gs.Node("Relu", "b", {}, [], [])]})
    assert graph.nodes[0].name == "b"


def test_the_first_of_some_nodes() -> None:
    graph = load(proto(chain(4, "Relu"))).graph
    nodes = list(graph.nodes)
    assert first_of(graph, [nodes[3], nodes[1]]) is nodes[1]
    graph.nodes = [nodes[3], nodes[0], nodes[1], nodes[2]]
    assert first_of(graph, [nodes[3], nodes[1]]) is nodes[3]
    graph.nodes[0], graph.nodes[3] = graph.nodes[3], graph.nodes[0]
    assert first_of(graph, [nodes[3], nodes[1]]) is nodes[1]


def test_a_tensor_with_many_readers_is_replaced_at_once() -> None:
    graph = load(proto(chain(20_000, "Add", "x"))).graph
    old, new = graph.inputs[0], gs.Variable("new", np.float32, ["N", 4])
    start = time.process_time()
    replace_uses(old, new, keep=graph.nodes[:2])
    assert time.process_time() - start < 2
    assert [n.name for n in old.outputs] == [graph.nodes[i].name for i in (0, 0, 1)]
    assert len(new.outputs) == 19_998
    assert all(node.inputs[1] is new for node in graph.nodes[2:])


def test_a_clone_is_independent_and_the_same() -> None:
    model = load(proto(chain(20, "MatMul", "w"), weight("w", 4, 4)))
    before = to_bytes(model)
    twin = Model(clone(model.graph), model.envelope)
    assert to_bytes(twin) == before
    inside = {id(t) for g in walk(twin.graph) for n in g.nodes for t in (*n.inputs, *n.outputs)}
    outside = {id(t) for n in model.graph.nodes for t in (*n.inputs, *n.outputs)}
    assert not inside & outside
    twin.graph.nodes[0].op = "Other"
    assert to_bytes(model) == before


def test_values_that_a_clone_shares_cannot_be_written() -> None:
    graph = load(proto(chain(2, "MatMul", "w"), weight("w", 4, 4))).graph
    held = store(graph, "held", np.zeros(4, np.float32))
    graph.nodes[0].inputs[1] = held
    clone(graph)
    with pytest.raises(ValueError, match="read-only"):
        held.values[0] = 1


@pytest.mark.parametrize("count", [100, 40_000])
def test_many_new_objects_are_not_walked_by_the_collector(count: int) -> None:
    """Each would be three times, on its way to the oldest ones."""
    gc.collect()
    with uncollected():
        made = [[index] for index in range(7 * count)]
    young = {id(each) for generation in (0, 1) for each in gc.get_objects(generation)}
    assert bool(young & set(map(id, made))) == (count == 100)
    assert gc.isenabled() and not gc.get_freeze_count()
