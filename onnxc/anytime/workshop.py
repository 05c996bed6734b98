"""Makes the candidates of a plan and tells their drop and their size: the work of one step.

A plan is carried out move by move. What the first moves make is a model like any other, of which
the next task chooses its passes; so several ways of the last task are several candidates. What
plans begin with is made once, and what was measured of it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from calib.data import Dataset
from onnxc import recipe as recipes
from onnxc.anytime.energy import energy
from onnxc.anytime.metric import Metric, estimated
from onnxc.anytime.moves import Move, Plan, name_of
from onnxc.anytime.settings import Objective
from onnxc.anytime.tallies import Estimate
from onnxc.cost import file_bytes
from onnxc.errors import OnnxcError
from onnxc.files import TemporaryFolder
from onnxc.graph import Model, copy, load, opset, to_bytes
from onnxc.graph import size as model_size
from onnxc.pairs import Subject
from onnxc.pipeline import PREPARED
from onnxc.recipe import Recipe
from onnxc.search import Builder, Way
from onnxc.shapes import infer
from onnxc.storage.packing import SUFFIX, store
from onnxc.workpiece import Workpiece, silent

NOTHING = Estimate(0.0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Candidate:
    """model: bytes where they are not many. amount: bytes or energy, where that is the objective.

    stages: how many passes each move of the plan has.
    """

    plan: str
    way: str
    model: Subject
    estimate: Estimate
    bytes: int = 0
    amount: float = 0.0
    recipe: str = ""
    stages: tuple[int, ...] = ()
    failure: str = ""


@dataclass
class Workshop:
    """piece: the prepared model. original: as given. chooses: the samples that drops are told on.

    suffix: of the file to be written. stages: what is known of the passes of plans, by name.
    best: passes whose model will be asked for again.
    """

    piece: Workpiece
    original: Subject
    chooses: Dataset
    metric: Metric
    bound: float
    objective: Objective
    suffix: str
    stages: dict[str, Way] = field(default_factory=dict)
    best: Way = PREPARED
    pieces: dict[Way, Workpiece] = field(default_factory=dict, repr=False)
    _builder: Builder | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """It travels to workers with its model and data, and nothing that was made of them."""
        known = replace(self.piece.calibration, client=None, original=None, memo={}, notes=[])
        facts = {spec.name: getattr(self.piece, spec.name) for spec in fields(self.piece)}
        facts |= {"model": to_bytes(self.piece.model), "calibration": known}
        facts |= {"say": silent, "memo": {}}
        return {**vars(self), "piece": facts, "pieces": {}, "_builder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        facts = dict(state["piece"])
        model = load(facts["model"])
        infer(model, facts["feed"])
        facts |= {"model": model, "calibration": replace(facts["calibration"], original=model)}
        vars(self).update(state, piece=Workpiece(**facts))

    @property
    def builder(self) -> Builder:
        if self._builder is None:
            piece = self.piece
            self._builder = Builder(
                piece.model, piece.context, piece.calibration, piece.feed, piece.say
            )
        return self._builder

    def candidates(self, plan: Plan) -> list[Candidate]:
        """All ways of a plan, measured; at least one, which may have failed."""
        name = name_of(plan)
        self.builder.forget(*self.pieces, self.best)
        try:
            start = self._passes(plan[:-1])
            ways = self._ways(start, plan[-1])
            found = [self._candidate(plan, start, way, rest) for way, rest in ways.items()]
        except OnnxcError as error:
            return [Candidate(name, "", b"", NOTHING, failure=str(error))]
        return found

    def original_amount(self) -> float:
        """The amount of the original."""
        model = self.original if isinstance(self.original, Model) else load(self.original)
        return self._amount(model)[1]

    def _passes(self, plan: Plan) -> Way:
        """Those of the first moves of a plan: as they were before, or as the tasks choose now."""
        if not plan:
            return PREPARED
        name = name_of(plan)
        if name not in self.stages:
            start = self._passes(plan[:-1])
            ways = self._ways(start, plan[-1])
            self.stages[name] = (*start, *next(iter(ways.values())))
        return self.stages[name]

    def _ways(self, start: Way, move: Move) -> Mapping[str, Way]:
        return move.task.ways(move.settings, self._piece(start))

    def _piece(self, start: Way) -> Workpiece:
        """The model that passes make, to be worked on."""
        if start not in self.pieces:
            self.pieces[start] = self.piece if start == PREPARED else self._next(start)
        return self.pieces[start]

    def _next(self, start: Way) -> Workpiece:
        piece, model = self.piece, copy(self.builder.built(start)[0])
        infer(model, piece.feed)
        calibration = replace(self.builder.calibration(start), known=None, memo={})
        context = replace(piece.context, opset=opset(model.graph))
        return replace(piece, model=model, context=context, calibration=calibration, memo={})

    def _candidate(self, plan: Plan, start: Way, way: str, rest: Way) -> Candidate:
        name, passes = name_of(plan), (*start, *rest)
        model, steps = self.builder.built(passes)
        done = [step for step in steps[len(start) :] if plan[-1].task.is_meant(step.name)]
        if not any(step.changes for step in done):
            told = [problem for step in done for problem in step.problems]
            why = "; ".join(told) or f"nothing was {plan[-1].task.aim.done}"
            return Candidate(name, way, b"", NOTHING, failure=why)
        subject: Subject = model if model.scratch is not None else to_bytes(model)
        self.piece.say(f"judging {name}: {way}")
        estimate = estimated(
            *(self.metric, self.original, subject, self.chooses, self.piece.runtime, self.bound)
        )
        size, amount = self._amount(model)
        recipe = recipes.dump(Recipe(passes))
        facts = (size, amount, recipe, self._counts(plan, passes))
        return Candidate(name, way, subject, estimate, *facts)

    def _counts(self, plan: Plan, passes: Way) -> tuple[int, ...]:
        starts = [len(self._passes(plan[:count])) for count in range(len(plan))]
        ends = [*starts[1:], len(passes)]
        return tuple(end - start for start, end in zip(starts, ends, strict=True))

    def _amount(self, model: Model) -> tuple[int, float]:
        """Bytes of the file, and what is to become small where that is no time."""
        size = model_size(model)
        if self.objective == "energy-proxy":
            return size, energy(model, self.piece.runtime)
        if self.objective == "size" and self.suffix == SUFFIX:
            with TemporaryFolder() as folder:
                place = Path(folder) / f"candidate{SUFFIX}"
                store(model, place)
                size = file_bytes(place)
        return size, float(size)
