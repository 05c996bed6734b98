"""What the runtime's own optimizations do to a result, beside what the rewriting did.

Fused kernels round elsewhere, sums of 8-bit products saturate on some processors, and an optimizer
may round float weights that stand between Q/DQ. So the written file is run twice on the same
samples, as it will be deployed and without any optimization:

    plain = SQNR of Q(x) against F(x)        what the rewriting costs: neither is optimized
    moved = SQNR of Q*(x) against Q(x)       what the optimizations cost on top of it

where F is the original, Q the result, and * stands for the options of the proof.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calib.data import Dataset
from onnxc.errors import ModelError
from onnxc.fidelity import compare
from onnxc.pairs import Subject, excess
from onnxc.runtime import Runtime

PLAIN = "none"  # the level without optimizations
SAMPLES = 4  # kernels without optimizations are slow, and a fault of others shows in every sample
STAGED = "the models run in stages, which takes too long to do it again without optimizations"
EXACT = 60.0  # dB: from here on, other sums of the same numbers differ by rounding


@dataclass(frozen=True)
class Execution:
    """How a result was run to be proven. samples: behind plain and moved, in dB (see above).

    Both are None where the proof itself ran without optimizations, where a model does not run
    without them, or where memory does not hold both models: then failure says why.
    """

    runtime: Runtime
    samples: int = 0
    plain: float | None = None
    moved: float | None = None
    failure: str = ""

    @property
    def is_doubtful(self) -> bool:
        """Whether optimizations change the outputs by more than the rewriting does."""
        if self.plain is None or self.moved is None:
            return False
        return self.moved < min(self.plain, EXACT)


def execution(
    original: Subject, result: Subject, judge: Dataset, runtime: Runtime = Runtime()
) -> Execution:
    """Run both on a few samples, with and without optimizations."""
    if runtime.level == PLAIN:
        return Execution(runtime)
    count = min(SAMPLES, len(judge))
    few = judge.subset([i * len(judge) // count for i in range(count)])
    if excess([original, result], next(iter(few.batches(1)))):
        return Execution(runtime, failure=STAGED)
    plain = replace(runtime, level=PLAIN)
    try:
        rewritten = compare(original, result, few, plain)
        moved = compare(result, result, few, plain, other=runtime)
    except ModelError as error:  # what only fusions make runnable
        return Execution(runtime, failure=str(error))
    return Execution(runtime, rewritten.samples, rewritten.sqnr, moved.sqnr)
