"""The order in which a search asks for plans, on made-up ladders whose outcomes are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxc.anytime import strategy
from onnxc.anytime.journal import Found
from onnxc.anytime.moves import Ladder, Move, Plan, Slot, name_of
from onnxc.anytime.strategy import Rule
from onnxc.anytime.tallies import Estimate
from onnxc.pruning import PruneSettings
from onnxc.tasks import PRUNE

SLOTS: tuple[Slot, ...] = ("prune", "factorize", "code")
World = Callable[[Plan], tuple[float, float]]  # cost and drop of a plan
ORIGINAL = Found("original", "", Estimate(0, 0, 0, 1), 1.0)


def _ladders(sizes: Sequence[int]) -> list[Ladder]:
    """Ladders whose moves say where they are by their settings."""

    def move(number: int, rung: int) -> Move:
        return Move(PRUNE, PruneSettings(macs=0.5 + number / 10 + rung / 1000))

    return [
        Ladder(SLOTS[n], tuple(move(n, i) for i in range(size)), first=min(1, size - 1))
        for n, size in enumerate(sizes)
    ]


def _place(move: Move) -> tuple[int, int]:
    settings = move.settings
    assert isinstance(settings, PruneSettings) and settings.macs is not None
    number, rung = divmod(round(1000 * (settings.macs - 0.5)), 100)
    return number, rung


def _world(gains: Sequence[float], drops: Sequence[float]) -> World:
    """Each rung takes a share of the cost, and adds to the drop more than the one before."""

    def outcome(plan: Plan) -> tuple[float, float]:
        cost, drop = 1.0, 0.0
        for number, rung in map(_place, plan):
            cost *= (1 - gains[number]) ** (rung + 1)
            drop += drops[number] * (rung + 1) ** 1.5
        return cost, drop

    return outcome


def _run(ladders: Sequence[Ladder], world: World, rule: Rule) -> tuple[Found, list[str]]:
    """The best candidate, and the plans in the order they were looked at, each once."""
    asked, best = strategy.search(ladders, rule, ORIGINAL), ORIGINAL
    known: dict[str, Found] = {}
    reply: Found | None = None
    while True:
        try:
            plan = next(asked) if reply is None else asked.send(reply)
        except StopIteration:
            return best, list(known)
        cost, drop = world(plan)
        name = name_of(plan)
        reply = known.setdefault(name, Found(name, "only", Estimate(drop, drop, drop, 9), cost))
        best = reply if rule.is_better(reply, best) else best


def _optimum(ladders: Sequence[Ladder], world: World, bound: float) -> float:
    """The least cost of all plans that keep the bound."""
    rows = [(None, *ladder.moves) for ladder in ladders]
    plans = (tuple(m for m in some if m is not None) for some in itertools.product(*rows))
    outcomes = [world(plan) for plan in plans]
    return min(cost for cost, drop in outcomes if drop <= bound)


@given(
    st.lists(st.floats(0.02, 0.3), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 2.0), min_size=3, max_size=3),
    st.floats(0.1, 5.0),
)
def test_best_keeps_the_bound_and_finds_one_where_there_is_one(
    gains: list[float], drops: list[float], bound: float
) -> None:
    ladders, world = _ladders((8, 8, 8)), _world(gains, drops)
    best, _ = _run(ladders, world, Rule(bound, 0.0))
    assert best.estimate.high <= bound
    if best is ORIGINAL:
        assert min(drops) > bound  # not one move alone keeps it


def test_best_is_near_the_optimum() -> None:
    draw, near = np.random.default_rng(0), []
    for _ in range(200):
        world = _world(draw.uniform(0.02, 0.3, 3), draw.uniform(0.01, 2.0, 3))
        ladders, bound = _ladders((8, 8, 8)), draw.uniform(0.1, 5.0)
        best, _ = _run(ladders, world, Rule(bound, 0.0))
        optimum = _optimum(ladders, world, bound)
        near.append(1.0 if optimum == 1 else (1 - best.cost) / (1 - optimum))
    assert np.mean(near) >= 0.99 and np.quantile(near, 0.05) >= 0.95 and min(near) >= 0.8


def test_looks_at_few_plans() -> None:
    ladders = _ladders((14, 14, 14))
    _, plans = _run(ladders, _world((0.05, 0.05, 0.1), (0.3, 0.5, 0.05)), Rule(2.0, 0.0))
    assert len(plans) < 50  # of 15^3


def test_the_cheapest_gain_is_taken_first() -> None:
    ladders = _ladders((1, 4, 4))
    _, plans = _run(ladders, _world((0.1, 0.1, 0.1), (0.5, 0.2, 0.01)), Rule(1.0, 0.0))
    assert plans[0] == "prune --macs 0.5"  # the first ladder, whatever it costs
    assert [plan.count("prune") for plan in plans[:4]] == [1, 1, 1, 2]
    assert "--macs 0.7" in plans[3]  # the third one, whose drop is least


def test_nothing_is_taken_that_gains_nothing() -> None:
    ladders = _ladders((4, 4, 4))
    best, plans = _run(ladders, _world((-0.1, -0.1, -0.1), (0.0, 0.0, 0.0)), Rule(1.0, 0.0))
    assert best is ORIGINAL and len(plans) <= 6


def test_at_equal_cost_the_drop_decides() -> None:
    rule = Rule(1.0, 0.05)
    rough, exact = (Found("p", "w", Estimate(x, x, x, 9), 0.5) for x in (0.8, 0.1))
    assert rule.is_better(exact, rough) and not rule.is_better(rough, exact)
    faster = Found("p", "w", Estimate(0.8, 0.8, 0.8, 9), 0.45)
    assert rule.is_better(faster, exact)


def test_a_failed_plan_is_passed_over() -> None:
    ladders = _ladders((3, 3, 3))
    good = _world((0.1, 0.1, 0.1), (0.1, 0.1, 0.1))

    def world(plan: Plan) -> tuple[float, float]:
        return good(plan) if all(_place(m)[0] != 1 for m in plan) else (1.0, float("inf"))

    best, _ = _run(ladders, world, Rule(5.0, 0.0))
    assert best.cost == pytest.approx(0.9**6)
