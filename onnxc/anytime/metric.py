"""The drop of a candidate in points, with its interval: what a search keeps below a bound.

    top1         what is lost of the share of right classes, in expectation (numerics.decisions)
    agreement    share of samples that get another class, likewise
    sqnr         noise in percent of the power of the outputs: 1 is 20 dB, 0.1 is 30 dB
    perplexity   growth of the perplexity of the next token, in percent
    MODULE:NAME  score(outputs, labels) of the original less that of the candidate

Samples are looked at in groups, the later ones as large as all before. As soon as the bound lies
outside of the interval, the rest need not be run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from calib.callables import imported, own_code
from calib.data import Dataset
from calib.inputs import Axes, sample_axes
from onnxc.anytime.tallies import Array, Decided, Drops, Estimate, Outputs, Scored, Tally
from onnxc.errors import DataError, OptionError
from onnxc.fidelity import class_scores, has_classes, next_tokens, surprise
from onnxc.numerics.decisions import Contest, logits, temperature
from onnxc.pairs import Pairing, Subject
from onnxc.runtime import Runtime

FIRST = 32  # samples that are always looked at
BATCH = 16  # samples in a run
MOST_FITTED = 512  # samples that T is fitted to
UNITS = {
    "top1": "points of top-1",
    "agreement": "points of agreement",
    "sqnr": "% of noise",
    "perplexity": "% of perplexity",
}
KNOWN = tuple(UNITS)


@dataclass(frozen=True)
class Metric:
    """name: as asked for. output: the one with the classes. T: of `numerics.decisions`.

    known: what the original gives for more samples, where each has one decision.
    """

    name: str
    output: str = ""
    T: float = 1.0
    known: Contest | None = field(default=None, repr=False)
    score: Callable[[dict[str, Any], Array | None], float] | None = None

    @property
    def unit(self) -> str:
        return UNITS.get(self.name, f"of {self.name}")

    def tally(self, axes: Axes) -> Tally:
        """Of an empty set of samples. axes: of the samples, by input."""
        if self.score is not None:
            return Scored(self.score)
        if self.name == "sqnr":
            return Drops(partial(_noise, axes=axes))
        if self.name == "perplexity":
            return Drops(self._surprise, _growth)
        return Decided(self.output, self.name == "top1", self.T, self.known)

    def _surprise(self, ref: Outputs, out: Outputs, labels: Array | None, feed: Outputs) -> Array:
        """What the logarithm of the perplexity grows by, in hundredths."""
        tokens = next_tokens(feed)
        if tokens is None:
            raise DataError("--metric perplexity needs one input of (N, T) tokens")
        scores = (class_scores(side[self.output])[:, : tokens.shape[1]] for side in (ref, out))
        both = [surprise(z, tokens).mean(axis=1) for z in scores]
        return np.asarray(100 * (both[1] - both[0]))


def estimated(
    metric: Metric,
    original: Subject,
    candidate: Subject,
    samples: Dataset,
    runtime: Runtime,
    bound: float | None = None,
) -> Estimate:
    """The drop of a candidate; where there is a bound, on as many samples as tell about it.

    Raises ModelError where a model does not run.
    """
    axes = sample_axes(samples.inputs)
    tally, labels, done, due = metric.tally(axes), samples.labels, 0, FIRST
    for feed, ref, out in Pairing(original, candidate, samples, runtime, BATCH).outputs():
        count = _count(feed, axes)
        tally.update(ref, out, None if labels is None else labels[done : done + count], feed)
        done += count
        if bound is not None and done >= due:
            due *= 2
            if tally.estimate.is_settled(bound):
                break
    return tally.estimate


def open_metric(
    name: str | None,
    original: Subject,
    samples: Dataset,
    runtime: Runtime,
    others: Dataset | None = None,
) -> Metric:
    """The metric that is asked for, or the one that suits the model; it was tried on two samples.

    others: more samples, on which only the original is run. Raises OptionError or DataError where
    it does not go with the model or the data.
    """
    metric = _chosen(name, original, [x for x in (samples, others) if x is not None], runtime)
    estimated(metric, original, original, samples.subset(slice(0, 2)), runtime)
    return metric


def _chosen(
    name: str | None, original: Subject, some: Sequence[Dataset], runtime: Runtime
) -> Metric:
    """By default top1 with labels, agreement with classes, perplexity of tokens, else sqnr."""
    if name is not None and ":" in name:
        return Metric(name, score=Score(name))
    seen = [_scores(original, samples, runtime) for samples in some]
    found = [one for one in seen if one is not None]
    if not found:
        if name in ("top1", "agreement", "perplexity"):
            raise OptionError(f"--metric {name} needs a model with classes; this one has none")
        return Metric("sqnr")
    output, is_text = found[0].output, found[0].is_text
    z = logits(np.concatenate([one.z for one in found]))
    labels = None if found[0].labels is None else np.concatenate([one.labels for one in found])
    usual = "perplexity" if is_text and labels is None else "top1"
    usual = "agreement" if usual == "top1" and labels is None else usual
    chosen = name or usual
    if chosen == "top1" and labels is None:
        raise OptionError("--metric top1 needs labels in the data: add them, or take agreement")
    T = 1.0 if labels is None or chosen != "top1" else temperature(z, labels)
    is_single = len(z) == sum(min(len(samples), MOST_FITTED) for samples in some)
    known = Contest.of(z, z, T) if is_single and len(found) > 1 else None
    return Metric(chosen, output, T, known)


@dataclass(frozen=True)
class Scores:
    """The output with classes, its rows of the first samples, their labels, and whether of text."""

    output: str
    z: Array
    labels: Array | None
    is_text: bool


def _scores(original: Subject, samples: Dataset, runtime: Runtime) -> Scores | None:
    """None where no output has classes."""
    few = samples.subset(slice(0, MOST_FITTED))
    labels, rows, name, is_text = few.labels, [], "", False
    is_one = labels is not None and labels.ndim == 1
    for feed, ref, _ in Pairing(original, original, few, runtime, BATCH).outputs():
        name = name or next((n for n, x in ref.items() if has_classes(x, is_one)), "")
        if not name:
            return None
        z = class_scores(ref[name], is_one)
        rows.append(z.reshape(-1, z.shape[-1]))
        is_text = is_text or next_tokens(feed) is not None
    flat = None if labels is None else labels.reshape(-1)
    return Scores(name, np.concatenate(rows), flat, is_text)


def _count(feed: Outputs, axes: Axes) -> int:
    """Samples in a batch."""
    return next((int(np.shape(feed[n])[a]) for n, a in axes.items() if a is not None), 1)


def _noise(ref: Outputs, out: Outputs, labels: Array | None, feed: Outputs, axes: Axes) -> Array:
    """Noise of each sample in percent of the power of its outputs, the mean over outputs.

    An output whose first axis is not that of the samples, such as a state, counts for all alike.
    """
    shares, n = [], _count(feed, axes)
    for name, y in ref.items():
        if not isinstance(y, np.ndarray) or y.dtype.kind != "f":
            continue
        count = n if y.shape[:1] == (n,) else 1
        rows = [x.reshape(count, -1).astype(np.float64) for x in (y, out[name])]
        power = np.maximum((rows[0] ** 2).mean(axis=1), 1e-300)
        share = ((rows[0] - rows[1]) ** 2).mean(axis=1) / power
        shares.append(np.broadcast_to(share, n))
    if not shares:
        raise OptionError("--metric sqnr needs an output of floats; give --metric MODULE:FUNCTION")
    return np.asarray(100 * np.mean(shares, axis=0))


def _growth(hundredths: float) -> float:
    """Percent that the perplexity grows by."""
    return 100 * math.expm1(hundredths / 100) if hundredths < 1e4 else math.inf


@dataclass(frozen=True)
class Score:
    """A function of the user's own, by name, so that it travels to other processes."""

    name: str

    def __call__(self, outputs: dict[str, Any], labels: Array | None) -> float:
        """Raises DataError for what is wrong in it."""
        with own_code(self.name):
            return float(imported(self.name)(outputs, labels))
