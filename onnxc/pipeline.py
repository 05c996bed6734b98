"""Run passes one by one; each is proven before the next one starts.

    snapshot → apply → check against the snapshot → keep, or restore the snapshot, byte for byte

A pass that raises or breaks the model leaves it as it was, and its Step says why. The reference is
run once: what a step computed is the reference of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from calib.collect import collect
from calib.data import Dataset
from calib.statistics import Statistics, order_of
from calib.twin import drift
from onnxc.check import Feed, Snapshot, problems, snapshot
from onnxc.core import Change, Context, Keeps, Key, Pass, Perturbs, Rescales, Sequential, Skip
from onnxc.errors import OnnxcError
from onnxc.graph import Model, become, copy, opset
from onnxc.rounds import InTurn
from onnxc.runtime import Runtime, first_line
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

if TYPE_CHECKING:
    from distributed import Client

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
    runtime: Runtime = Runtime(),
) -> Step:
    """Apply a pass to a model in place, or leave the model as it was and say why.

    feed: one batch by input name for the numeric check; without it only validity is checked.
    before: the `after` of the previous step, which saves the reference run. runtime: how the model
    is run for it.
    """
    old = (before or snapshot(model, feed, runtime)).kept(model)
    try:
        results = pass_.apply(model.graph, context)
        changes = tuple(r for r in results if isinstance(r, Change))
        skips = tuple(r for r in results if isinstance(r, Skip))
        new = snapshot(model, feed, runtime) if changes else old
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
            infer(model, proto=last.proto)
        context = Context(opset=opset(model.graph), target=Target("any"))
        step = apply_pass(model, pass_, context, feed, last)
        last = step.after or last
        is_new = bool(step.changes or step.problems)
        steps.append(step)
    return steps


@dataclass(frozen=True)
class Calibration:
    """What passes may have statistics of, and what gathering them may take.

    dataset: None where there are only statistics gathered before. max_memory: bytes of the process,
    or None. notes: gets sentences for the report. known: statistics of the prepared model. client:
    of a Dask cluster, whose workers then run the model. original: the prepared model, which
    sequential passes compare the rewritten one with. runtime: how each rewrite is proven.
    """

    dataset: Dataset | None
    max_memory: int | None = None
    threads: int = 1
    notes: list[str] = field(default_factory=list)
    memo: dict[Any, dict[Key, Any]] = field(default_factory=dict, repr=False)
    known: Statistics | None = None
    client: Client | None = None
    original: Model | None = field(default=None, repr=False)
    runtime: Runtime = Runtime()

    def answers(self, wanted: Collection[Key]) -> dict[Key, Any]:
        """What is known of the prepared model."""
        stats = {} if self.known is None else self.known.stats
        return {key: stats[key] for key in wanted if key in stats}


FEWEST, MOST = 16, 128  # samples behind peaks and drift
ENOUGH = 600_000  # input values behind them, where samples are small

SETTLE_EARLY = frozenset({"peak", "mean"})

PREPARED = ()  # the state of a model that was prepared and no more, of which statistics are kept


def few(dataset: Dataset) -> Dataset:
    """Evenly spread samples for statistics that settle early, peaks and drift."""
    count = len(dataset)
    feed = next(iter(dataset.batches(1)))
    size = sum(np.size(x) for x in feed.values())
    wanted = min(max(ENOUGH // max(size, 1), FEWEST), MOST)
    if count <= wanted:
        return dataset
    return dataset.subset([i * count // wanted for i in range(wanted)])


def gather(
    model: Model,
    pass_: Pass,
    context: Context,
    calibration: Calibration,
    progress: Progress | None = None,
    state: Hashable = None,
    source: Model | None = None,
) -> dict[Key, Any]:
    """The statistics that a pass wants of a model as it stands.

    progress: told "quantize: calibrating 16/80", and so on. state: what the model is known by, so
    that the same statistics of it are gathered once; those of PREPARED may be known beforehand.
    source: the model of that state, where this one has its statistics but was changed since.
    """
    wanted = frozenset(pass_.wants(model.graph, context))
    drifting = sorted((key for key in wanted if key.what == "drift"), key=order_of)
    name = (state, wanted, pass_ if drifting else None)  # another perturbation, another drift
    if state is not None and name in calibration.memo:
        return calibration.memo[name]
    stats = calibration.answers(wanted) if state == PREPARED else {}
    calibration.memo[name] = stats
    missing = sorted(wanted - stats.keys(), key=order_of)
    if calibration.dataset is None:
        calibration.notes.extend(_unanswered(pass_, missing, calibration))
        return stats
    settled = [key for key in missing if key.what in SETTLE_EARLY]
    early = {*settled, *drifting}
    rest = [key for key in missing if key not in early]
    say = partial(_count, progress, pass_.name) if progress is not None else None
    for keys, dataset in ((settled, few(calibration.dataset)), (rest, calibration.dataset)):
        if keys:
            origin = source if source is not None and _holds(source, keys) else model
            stats.update(_collect(origin, keys, dataset, calibration, say))
    if drifting and isinstance(pass_, Perturbs):
        current = copy(model)
        pass_.perturb(current.graph, context)
        stats.update(_drift(model, current, drifting, few(calibration.dataset), calibration))
    return stats


def _holds(model: Model, keys: Iterable[Key]) -> bool:
    """Whether the tensors of all keys are in a model."""
    tensors = {t.name for node in model.graph.nodes for t in node.outputs}
    tensors |= {t.name for t in model.graph.inputs}
    return all({key.tensor, key.minus or key.tensor} <= tensors for key in keys)


def _unanswered(pass_: Pass, missing: Sequence[Key], calibration: Calibration) -> Iterator[str]:
    """A sentence on what a pass has to do without."""
    if missing and calibration.known is not None:
        first = f"{missing[0].what} of {missing[0].name!r}"
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield (
            f"{pass_.name} wants what statistics {calibration.known.path} do not hold "
            f"({first}{rest}): give --data to gather it"
        )


def _count(progress: Progress, name: str, done: int, total: int) -> None:
    progress(f"{name}: calibrating {done}/{total}")


def _collect(
    model: Model,
    keys: Sequence[Key],
    dataset: Dataset,
    calibration: Calibration,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Key, Any]:
    found = collect(
        *(model, keys, dataset),
        max_memory=calibration.max_memory,
        threads=calibration.threads,
        progress=progress,
        client=calibration.client,
    )
    calibration.notes.extend(note for note in found.notes if note not in calibration.notes)
    return dict(found.stats)


def _drift(
    original: Model,
    current: Model,
    keys: Sequence[Key],
    dataset: Dataset,
    calibration: Calibration,
) -> dict[Key, Any]:
    axes = {key.tensor: 1 if key.axis is None else key.axis for key in keys}
    found = drift(
        original,
        current,
        list(axes),
        dataset,
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
    source: Model | None = None,
) -> list[Step]:
    """Run passes on a model in place, each with the statistics of the model that it gets.

    last: the snapshot of the model as given, where there is one. state, source: see `gather`; they
    stand for the model as given, so they serve one pass.
    """
    steps: list[Step] = []
    for pass_ in passes:
        if progress is not None:
            progress(pass_.name)
        infer(model, feed, None if last is None else last.proto)
        known = (None, None) if steps else (state, source)
        ready = _in_turn(model, pass_, calibration, progress)
        stats = gather(model, ready, context, calibration, progress, *known)
        original = None if calibration.original is None else calibration.original.graph
        now = replace(context, opset=opset(model.graph), stats=stats, original=original)
        done = apply_pass(model, ready, now, feed, last, calibration.runtime)
        step = replace(done, name=pass_.name)
        last = step.after or last
        calibration = renewed(pass_, step, model, calibration)
        steps.append(step)
    return steps


def renewed(pass_: Pass, step: Step, model: Model, calibration: Calibration) -> Calibration:
    """What passes behind a step compare with: the model it left, where it scaled tensors."""
    is_scaled = isinstance(pass_, Rescales) and pass_.rescales and bool(step.changes)
    return replace(calibration, original=copy(model)) if is_scaled else calibration


def _in_turn(
    model: Model, pass_: Pass, calibration: Calibration, progress: Progress | None
) -> Pass:
    """A pass as it is; a sequential one with the data of its steps, where there is some."""
    dataset, original = calibration.dataset, calibration.original
    if not isinstance(pass_, Sequential) or dataset is None or original is None:
        return pass_
    bounds = (calibration.max_memory, calibration.threads, progress)
    return InTurn(pass_, model, original, dataset, *bounds)


def keeps_statistics(pass_: Pass, step: Step) -> bool:
    """Whether statistics of the model before a step hold for the model after it."""
    return not step.changes or (isinstance(pass_, Keeps) and pass_.keeps_statistics)


def restore(model: Model, state: Snapshot) -> None:
    """Put a model back, byte for byte, to the state of a snapshot."""
    become(model.graph, copy(state.model).graph)


def _reason(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, OnnxcError) else f"{type(error).__name__}: {text}"
