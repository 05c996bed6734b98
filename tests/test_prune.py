"""Pruning: which channels go, what the rest makes up for, budgets, and what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from texts import bind, changed, context, normal, outputs, reasons

from calib.collect import collect
from calib.data import Dataset, InputSpec, open_data
from calib.moments import MomentsObserver
from onnxc.bench import Length
from onnxc.channels.budget import budget
from onnxc.channels.criteria import CRITERIA, View, rank
from onnxc.channels.groups import find_channels
from onnxc.core import Change, Context
from onnxc.cost import inspect
from onnxc.damage import measure
from onnxc.errors import OptionError
from onnxc.graph import Model, load, values
from onnxc.pipeline import Calibration, compress
from onnxc.profile import node_times
from onnxc.pruning import PruneSettings, ways
from onnxc.shapes import infer
from onnxc.workpiece import Workpiece
from passes.prune import Prune, parts
from passes.reconstruct import Reconstruct
from passes.shrink import Shrink

DATA = {"x": normal(64, 3, 8, 8)}
TEXT = """g (float[N,3,8,8] x, float[8,3,3,3] A, float[8] a, float[12,8,3,3] B, float[5,12] F)
    => (float[N,5] y) {
    c = Conv <pads: ints = [1,1,1,1]> (x, A, a)
    r = Relu (c)
    d = Conv <pads: ints = [1,1,1,1]> (r, B)
    s = Relu (d)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    y = Gemm <transB: int = 1> (f, F) }"""


def weights() -> dict[str, Any]:
    """Of a small network in which channels 0 and 1 of the first layer are the same."""
    A, a = normal(8, 3, 3, 3), normal(8)
    A[1], a[1] = A[0], a[0]
    return {"A": A, "a": a, "B": normal(12, 8, 3, 3), "F": normal(5, 12)}


def opened(**changes: Any) -> Model:
    model = load(bind(TEXT, 17, **{**weights(), **changes}))
    infer(model, DATA)
    return model


def dataset() -> Dataset:
    return open_data(DATA, [InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))])


def with_stats(model: Model, pass_: Prune, **only: tuple[str, ...]) -> Context:
    bare = context(model, **only)
    keys = list(pass_.wants(model.graph, bare))
    return replace(bare, stats=dict(collect(model, keys, dataset(), threads=1).stats))


def error(model: Model) -> float:
    """Of the outputs, relative to their variance."""
    y, made = outputs(opened(), DATA)["y"], outputs(model, DATA)["y"]
    return float(np.mean((y - made) ** 2) / y.var())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes_and_shrinks(criterion: Any) -> None:
    model, pass_ = opened(), Prune(ratio=0.25, criterion=criterion)
    done = pass_.apply(model.graph, with_stats(model, pass_))
    assert "2 of 8 channels out by" in " ".join(r.what for r in done if isinstance(r, Change))
    before = outputs(model, DATA)["y"]
    Shrink().apply(model.graph, context(model))
    shapes = [tuple(node.inputs[1].shape) for node in model.graph.nodes if node.op == "Conv"]
    assert shapes == [(6, 3, 3, 3), (9, 6, 3, 3)]
    np.testing.assert_allclose(outputs(model, DATA)["y"], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("has_data", [True, False])
def test_moments_of_wide_layers_are_never_whole(
    criterion: Any, has_data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution over 28,224 inputs took more memory than there was."""
    monkeypatch.setattr("onnxc.moments.WIDEST", 30)
    for name in ("calib.plan", "onnxc.channels.criteria"):
        monkeypatch.setattr(f"{name}.BLOCK", 20)
    monkeypatch.setattr(MomentsObserver, "second", property(lambda self: pytest.fail("whole")))
    model, pass_ = opened(), Prune(ratio=0.25, criterion=criterion)
    given = with_stats(model, pass_) if has_data else context(model)
    if has_data:
        widths = {x.products.shape[1:3] for k, x in given.stats.items() if k.what == "moments"}
        assert (4, 18) in widths  # of 72 columns
    pass_.apply(model.graph, given)
    Shrink().apply(model.graph, context(model))
    shapes = [tuple(node.inputs[1].shape) for node in model.graph.nodes if node.op == "Conv"]
    assert shapes == [(6, 3, 3, 3), (9, 6, 3, 3)]


def test_blocks_cost_little_of_what_the_update_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for block, update in ((1024, True), (36, True), (1024, False)):
        monkeypatch.setattr("onnxc.moments.WIDEST", block)
        monkeypatch.setattr("calib.plan.BLOCK", block)
        model, pass_ = opened(), Prune(ratio=0.5, update=update)
        pass_.apply(model.graph, with_stats(model, pass_))
        errors.append(error(model))
    whole, halves, none = errors
    assert whole < halves < 0.9 * none


def test_a_twin_goes_first_and_hands_its_weights_over() -> None:
    model, pass_ = opened(), Prune(remove=("Conv_0=1",))
    pass_.apply(model.graph, with_stats(model, pass_))
    kept = np.flatnonzero(values(model.graph.nodes[2].inputs[1]).any(axis=(0, 2, 3)))
    assert len(kept) == 7 and len({0, 1} & set(kept)) == 1
    assert error(model) < 1e-3


def test_the_update_helps() -> None:
    errors = []
    for update in (True, False):
        model, pass_ = opened(), Prune(ratio=0.5, update=update)
        pass_.apply(model.graph, with_stats(model, pass_))
        errors.append(error(model))
    assert errors[0] < 0.7 * errors[1]


def test_without_data_it_goes_by_the_weights_and_says_so() -> None:
    model = opened()
    results = Prune(ratio=0.25).apply(model.graph, context(model))
    assert any("without data" in r.what for r in results if isinstance(r, Change))


def test_channels_that_are_out_count() -> None:
    B = weights()["B"]
    B[:, [3, 5]] = 0
    model = opened(B=B)
    results = Prune(ratio=0.25).apply(model.graph, context(model))
    assert "all 6 channels stay" in reasons(results)


def test_a_group_is_chosen_by_what_makes_it() -> None:
    model = opened()
    results = Prune(ratio=0.25).apply(model.graph, context(model, include=("Conv_0",)))
    assert {"Conv_0", "Conv_2"} == set(changed(results))
    assert "Conv_2 makes them too, and is excluded" in reasons(results)
    model = opened()
    assert not changed(Prune().apply(model.graph, context(model, exclude=("Conv_2",))))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"ratio": 1.0}, "ratio is a share from 0 to 1, not 1"),
        ({"remove": ("Conv_0",)}, "remove takes NODE=COUNT"),
    ],
)
def test_bad_fields_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        Prune(**settings)


@pytest.mark.parametrize("name", ["Gemm_6", "Relu_1"])
def test_a_group_that_is_none_is_refused(name: str) -> None:
    model = opened()
    with pytest.raises(OptionError, match=f"no channels can be taken from '{name}'"):
        Prune(remove=(f"{name}=1",)).apply(model.graph, context(model))


def test_reconstruction_comes_closer_than_the_update() -> None:
    original, errors = opened(), []
    for passes in ((), (Reconstruct(),)):
        model = opened()
        calibration = Calibration(dataset(), original=original)
        steps = compress(model, (Prune(ratio=0.4), *passes, Shrink()), context(model), calibration)
        assert not any(step.problems for step in steps)
        errors.append(error(model))
    assert errors[1] < errors[0]


def test_ranking_costs_more_with_each_channel() -> None:
    model, pass_ = opened(), Prune()
    found = with_stats(model, pass_)
    part = parts(model.graph, found)[0]
    view = View(part.group, {n.name: n for n in model.graph.nodes}, found.stats)
    ranking = rank(view, "obs", 7)
    assert len(ranking.order) == 7 and set(ranking.order) <= set(range(8))
    assert ranking.damage[0] == 0 and (np.diff(ranking.damage) >= -1e-9).all()
    assert ranking.order[0] in (0, 1)  # a twin
    assert ranking.damage[1] < 0.5 * (ranking.damage[2] - ranking.damage[1])


def test_the_budget_is_that_of_the_graph_after_the_cut() -> None:
    model = opened()
    channels = find_channels(model.graph)
    groups = [g for g in channels.groups() if not g.obstacle]
    macs = {node.name: float(node.macs or 0) for node in inspect(model).heavy}
    costs = budget(model.graph, channels, groups, macs)
    before = inspect(model).macs
    assert costs.total == before
    planned = float(costs.cost(np.array([[6.0, 9.0]]))[0])
    Prune(ratio=0.25).apply(model.graph, context(model))
    Shrink().apply(model.graph, context(model))
    assert inspect(model).macs == planned


def piece(model: Model) -> Workpiece:
    calibration = Calibration(dataset().subset(range(48)), original=model)
    held = dataset().subset(range(48, 64))
    feed = {"x": DATA["x"][:1]}
    return Workpiece(model, context(model), calibration, feed, judge=held)


@pytest.mark.parametrize("budgeted", [{"macs": 0.7}, {"ratio": 0.3}, {"latency": 0.8}])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_budgets_become_counts(budgeted: dict[str, float], allocation: Any) -> None:
    model = opened()
    found = ways(PruneSettings(**budgeted, allocation=allocation), piece(model))
    ((name, passes),) = found.items()
    assert f"{allocation}, obs" in name
    prune = passes[0]
    assert isinstance(prune, Prune)
    if "macs" in budgeted:
        before = inspect(model).macs
        prune.apply(model.graph, context(model))
        Shrink().apply(model.graph, context(model))
        after = inspect(model).macs
        assert before is not None and after is not None
        assert after <= 0.7 * before


def test_damage_is_measured_on_samples_apart() -> None:
    model = opened()
    work = piece(model)
    found = with_stats(model, Prune())
    free = [part for part in parts(model.graph, found) if not part.obstacle]
    measured = measure(work, Prune(ratio=0.0), free, found.stats, 1)
    for one in measured:
        assert one.curve.damage[0] == 0
        assert (np.diff(one.curve.damage) >= 0).all()
    assert measured[0].curve.damage[1] < 1e-3  # the twin


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"ratio": 0.3, "macs": 0.7}, "give one of ratio, macs and latency"),
        ({"macs": 1.5}, "macs is a share between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        PruneSettings(**settings)


def test_times_go_to_the_nodes_that_take_them() -> None:
    model = opened()
    times = node_times(model, {"x": DATA["x"][:1]}, length=Length(3))
    assert {"Conv_0", "Conv_2"} <= times.keys()
    assert all(milliseconds > 0 for milliseconds in times.values())
