"""A search that is stopped anywhere and resumed, on a workshop whose candidates are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxc.anytime.journal import SUFFIX, Journal, begin
from onnxc.anytime.moves import Plan, ladders, name_of
from onnxc.anytime.run import Run
from onnxc.anytime.tallies import Estimate
from onnxc.anytime.workshop import Candidate
from onnxc.errors import OptionError
from onnxc.graph import load, to_bytes

Parse = Callable[..., onnx.ModelProto]
SUBJECT = {"model": "abc", "max_drop": 1.0}
HARM = {"prune": 0.5, "factorize": 0.8, "cluster": 0.05, "quantize": 0.07}


class Killed(BaseException):
    """What ends a search in the middle."""


@dataclass
class Table:
    """Candidates by the place of their moves. patience: plans before it is killed."""

    original: bytes
    patience: int = 10**6
    objective: str = "size"
    bound: float = 1.0
    chooses: tuple[int, ...] = (1, 2, 3)
    stages: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    metric: Any = None
    piece: Any = None

    def original_amount(self) -> float:
        return 1000.0

    def candidates(self, plan: Plan) -> list[Candidate]:
        if len(self.seen) >= self.patience:
            raise Killed
        name = name_of(plan)
        self.seen.append(name)
        drop = amount = 0.0
        rungs = {m.name: i for row in LADDERS for i, m in enumerate(row.moves)}
        for move in plan:
            drop += HARM[move.task.name] * (rungs[move.name] + 1) ** 1.3
            amount += np.log1p(rungs[move.name] + 1)
        model = load(self.original)
        model.graph.nodes[0].name = name
        left = 1000 * np.exp(-amount)
        interval = Estimate(drop, 0.9 * drop, 1.1 * drop, 32)
        return [Candidate(name, "only", to_bytes(model), interval, int(left), left)]


LADDERS = ladders("size", Path("model.onnxz"))


@pytest.fixture
def source(parse: Parse, tmp_path: Path) -> Path:
    model = parse("m (float[1,2] x) => (float[1,2] y) { y = Relu(x) }")
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def _run(source: Path, resume: bool, patience: int = 10**6, limit: float = 1e9) -> Run:
    output = source.with_name("small.onnx")
    job: Any = SimpleNamespace(path=source, output=output, files={}, say=lambda text: None)
    shop: Any = Table(source.read_bytes(), patience)
    return Run(job, shop, LADDERS, begin(output, SUBJECT, resume), limit)


def _is_valid(path: Path) -> bool:
    onnx.checker.check_model(onnx.load(path))
    return True


def test_best_is_on_disk_and_keeps_the_bound(source: Path) -> None:
    run = _run(source, resume=False)
    best = run.search()
    assert run.is_complete and best.estimate.high <= 1.0 and best.cost < 0.3
    assert onnx.load(run.job.output).graph.node[0].name == best.plan


@pytest.mark.parametrize("patience", range(0, 24, 2))
def test_killed_and_resumed_ends_where_an_uninterrupted_one_does(
    source: Path, patience: int
) -> None:
    whole = _run(source, resume=False)
    best, expected = whole.search(), whole.job.output.read_bytes()
    lines = whole.journal.path.read_text().count("\n")
    for stop in (patience, 1):
        with pytest.raises(Killed):
            _run(source, resume=stop == 1, patience=stop).search()
        assert _is_valid(source.with_name("small.onnx"))
    again = _run(source, resume=True)
    assert again.search().plan == best.plan
    assert again.job.output.read_bytes() == expected
    assert again.journal.path.read_text().count("\n") == lines


def test_a_line_that_was_cut_off_is_not_counted(source: Path) -> None:
    run = _run(source, resume=False)
    best = run.search()
    text = run.journal.path.read_bytes()
    run.journal.path.write_bytes(text[: len(text) - 20])
    again = _run(source, resume=True)
    assert again.search().plan == best.plan and len(again.workshop.seen) == 1  # type: ignore[attr-defined]


def test_nothing_is_begun_when_the_time_is_over(source: Path) -> None:
    run = _run(source, resume=False, limit=0.0)
    run.search()
    assert not run.is_complete
    assert run.workshop.seen == ["cluster --bits 6 --method ecsq --loss 0.03"]  # type: ignore[attr-defined]


def test_a_journal_of_another_search_is_refused(source: Path) -> None:
    output = source.with_name("small.onnx")
    begin(output, SUBJECT, resume=False)
    with pytest.raises(OptionError, match="max_drop differ"):
        begin(output, {**SUBJECT, "max_drop": 2.0}, resume=True)
    output.with_name(output.name + SUFFIX).write_text("nonsense\n")
    with pytest.raises(OptionError, match="leave --resume out"):
        begin(output, SUBJECT, resume=True)


def test_plans_ahead_are_those_that_come(source: Path) -> None:
    run = _run(source, resume=False)
    ahead = run._next(4)
    assert len(ahead) == 4
    asked: list[str] = []
    whole = _run(source, resume=False)
    whole.search()
    asked = list(whole.journal.found)
    assert name_of(ahead[0]) == asked[0]
    assert {name_of(plan) for plan in ahead[:4]} <= {*asked, *map(name_of, ahead)}
    assert sum(name_of(plan) in asked for plan in ahead) >= 2


def test_journal_keeps_all_that_is_known(tmp_path: Path) -> None:
    journal = begin(tmp_path / "x.onnx", SUBJECT, resume=False)
    assert json.loads(journal.path.read_text()) == SUBJECT
    assert isinstance(journal, Journal) and journal.elapsed == 0.0


def test_plans_that_were_refused_are_not_made_ahead(source: Path) -> None:
    run = _run(source, resume=False, limit=0.0)
    run.search()
    assert run.refused and not {name_of(plan) for plan in run._next(4)} & {*run.refused}
