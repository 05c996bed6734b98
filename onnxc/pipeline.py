"""Run passes one by one; each is proven before the next one starts.

    snapshot → apply → check against the snapshot → keep, or restore the snapshot, byte for byte

A pass that raises or breaks the model leaves it as it was, and its Step says why. The reference is
run once: what a step computed is the reference of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx

from calib.collect import collect
from calib.data import Dataset
from calib.twin import drift
from onnxc.check import Feed, Snapshot, problems, snapshot
from onnxc.core import Change, Context, Key, Pass, Perturbs, Skip
from onnxc.errors import OnnxcError
from onnxc.graph import Model, become, copy, opset
from onnxc.runtime import first_line
from onnxc.shapes import infer
from onnxc.targets import Target
from passes.drop_identity import DropIdentity
from passes.drop_zero_states import DropZeroStates
from passes.expand_broadcasts import ExpandBroadcasts
from passes.fold_constants import FoldConstants
from passes.fold_norm import FoldNorm
from passes.merge_bias import MergeBias
from passes.simplify_shapes import SimplifyShapes
from passes.upgrade_opset import UpgradeOpset
from passes.widen import Widen

PREPARATION: tuple[Pass, ...] = (
    UpgradeOpset(),
    Widen(),
    FoldConstants(),
    DropIdentity(),
    FoldNorm(),
    MergeBias(),
    SimplifyShapes(),
    DropZeroStates(),
    ExpandBroadcasts(),
)

PASS_ERRORS: tuple[type[Exception], ...] = (  # what a rewrite may raise; never KeyboardInterrupt
    OnnxcError,
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError),
    *(onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """What one pass did. With problems, the model is as it was before and changes is empty."""

    name: str
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    problems: tuple[str, ...] = ()
    after: Snapshot | None = field(default=None, repr=False, compare=False)


def apply_pass(
    model: Model,
    pass_: Pass,
    context: Context,
    feed: Feed | None = None,
    before: Snapshot | None = None,
) -> Step:
    """Apply a pass to a model in place, or leave the model as it was and say why.

    feed: one batch by input name for the numeric check; without it only validity is checked.
    before: the `after` of the previous step, which saves the reference run.
    """
    old = before or snapshot(model, feed)
    try:
        results = pass_.apply(model.graph, context)
        changes = tuple(r for r in results if isinstance(r, Change))
        skips = tuple(r for r in results if isinstance(r, Skip))
        new = snapshot(model, feed) if changes else old
        found = problems(old, new, feed, pass_.lossless) if changes else []
    except PASS_ERRORS as error:
        restore(model, old)
        return Step(pass_.name, (), (), (_reason(error),), old)
    if found:
        restore(model, old)
        return Step(pass_.name, (), skips, tuple(found), old)
    return Step(pass_.name, changes, skips, (), new)


def prepare(
    model: Model,
    feed: Feed | None = None,
    passes: Iterable[Pass] = PREPARATION,
    progress: Progress | None = None,
) -> list[Step]:
    """Run the preparation passes on a model in place, each checked, and rolled back on failure.

    feed: one batch by input name. `passes` may be lengthened or cut; the order is the caller's.
    """
    steps: list[Step] = []
    last = snapshot(model, feed)
    is_new = True
    for pass_ in passes:
        if progress is not None:
            progress(pass_.name)
        if is_new:
            infer(model)
        context = Context(opset=opset(model.graph), target=Target("any"))
        step = apply_pass(model, pass_, context, feed, last)
        last = step.after or last
        is_new = bool(step.changes or step.problems)
        steps.append(step)
    return steps


@dataclass(frozen=True)
class Calibration:
    """The data that passes may have statistics of, and what gathering them may take.

    max_memory: bytes of the process, or None. notes: gets sentences for the report.
    """

    dataset: Dataset
    max_memory: int | None = None
    threads: int = 1
    notes: list[str] = field(default_factory=list)
    memo: dict[Any, dict[Key, Any]] = field(default_factory=dict, repr=False)

    def few(self) -> Dataset:
        """Evenly spread samples for statistics that settle early, peaks and drift."""
        count = len(self.dataset)
        feed = next(iter(self.dataset.batches(1)))
        size = sum(np.size(x) for x in feed.values())
        wanted = min(max(ENOUGH // max(size, 1), FEWEST), MOST)
        if count <= wanted:
            return self.dataset
        return self.dataset.subset([i * count // wanted for i in range(wanted)])


FEWEST, MOST = 16, 128  # samples behind peaks and drift
ENOUGH = 600_000  # input values behind them, where samples are small

SETTLE_EARLY = frozenset({"peak", "mean"})


def gather(
    model: Model,
    pass_: Pass,
    context: Context,
    calibration: Calibration,
    progress: Progress | None = None,
    state: Hashable = None,
) -> dict[Key, Any]:
    """The statistics that a pass wants of a model as it stands.

    progress: told "quantize: calibrating 16/80", and so on. state: what the model is known by, so
    that the same statistics of it are gathered once.
    """
    say = partial(_count, progress, pass_.name) if progress is not None else None
    wanted = frozenset(pass_.wants(model.graph, context))
    if state is not None and (state, wanted) in calibration.memo:
        return calibration.memo[state, wanted]
    stats = calibration.memo[state, wanted] = {}
    drifting = [key for key in wanted if key.what == "drift"]
    early = [key for key in wanted if key.what in SETTLE_EARLY]
    full = [key for key in wanted if key not in {*drifting, *early}]
    for keys, dataset in ((early, calibration.few()), (full, calibration.dataset)):
        if keys:
            stats.update(_collect(model, keys, dataset, calibration, say))
    if drifting and isinstance(pass_, Perturbs):
        current = copy(model)
        pass_.perturb(current.graph, context)
        stats.update(_drift(model, current, drifting, calibration))
    return stats


def _count(progress: Progress, name: str, done: int, total: int) -> None:
    progress(f"{name}: calibrating {done}/{total}")


def _collect(
    model: Model,
    keys: Sequence[Key],
    dataset: Dataset,
    calibration: Calibration,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Key, Any]:
    bound, threads = calibration.max_memory, calibration.threads
    found = collect(model, keys, dataset, max_memory=bound, threads=threads, progress=progress)
    calibration.notes.extend(note for note in found.notes if note not in calibration.notes)
    return dict(found.stats)


def _drift(
    original: Model, current: Model, keys: Sequence[Key], calibration: Calibration
) -> dict[Key, Any]:
    axes = {key.tensor: 1 if key.axis is None else key.axis for key in keys}
    found = drift(
        original,
        current,
        list(axes),
        calibration.few(),
        axes,
        samples=MOST,
        max_memory=calibration.max_memory,
        threads=calibration.threads,
        notes=calibration.notes,
    )
    return {key: found[key.tensor] for key in keys}


def compress(
    model: Model,
    passes: Iterable[Pass],
    context: Context,
    calibration: Calibration,
    feed: Feed | None = None,
    progress: Progress | None = None,
    last: Snapshot | None = None,
    state: Hashable = None,
) -> list[Step]:
    """Run passes on a model in place, each with the statistics of the model that it gets.

    last: the snapshot of the model as given, where there is one. state: see `gather`; it stands for
    the model as given, so it serves one pass.
    """
    steps: list[Step] = []
    for pass_ in passes:
        if progress is not None:
            progress(pass_.name)
        infer(model, feed)
        known = None if steps else state
        stats = gather(model, pass_, context, calibration, progress, known)
        now = replace(context, opset=opset(model.graph), stats=stats)
        step = apply_pass(model, pass_, now, feed, last)
        last = step.after or last
        steps.append(step)
    return steps


def restore(model: Model, state: Snapshot) -> None:
    """Put a model back, byte for byte, to the state of a snapshot."""
    become(model.graph, copy(state.model).graph)


def _reason(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, OnnxcError) else f"{type(error).__name__}: {text}"
