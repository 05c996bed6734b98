"""Run passes one by one; each is proven before the next one starts.

    snapshot → apply → check against the snapshot → keep, or restore the snapshot, byte for byte

A pass that raises or breaks the model leaves it as it was, and its Step says why. The reference is
run once: what a step computed is the reference of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import onnx

from onnxc.check import Feed, Snapshot, problems, snapshot
from onnxc.core import Change, Context, Pass, Skip
from onnxc.errors import OnnxcError
from onnxc.graph import Model, become, copy, opset
from onnxc.runtime import first_line
from onnxc.shapes import infer
from onnxc.targets import Target
from passes.drop_identity import DropIdentity
from passes.fold_constants import FoldConstants
from passes.fold_norm import FoldNorm
from passes.upgrade_opset import UpgradeOpset

PREPARATION: tuple[Pass, ...] = (UpgradeOpset(), FoldConstants(), DropIdentity(), FoldNorm())

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


def restore(model: Model, state: Snapshot) -> None:
    """Put a model back, byte for byte, to the state of a snapshot."""
    become(model.graph, copy(state.model).graph)


def _reason(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, OnnxcError) else f"{type(error).__name__}: {text}"
