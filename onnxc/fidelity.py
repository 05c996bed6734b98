"""How close a candidate model is to its reference, streamed over a data set in float64.

    SQNR   = 10 log10(Σ ref² / Σ (ref − out)²)           dB, over all samples of one output
    cosine = Σ ref·out / √(Σ ref² · Σ out²)
    agreement = share of positions where arg max ref = arg max out, along the class axis
    perplexity = exp(−mean log softmax(logits)[next token])

The class axis is the last one after trailing axes of length 1 are dropped; with one label a
sample, each sample is flattened first. Over all outputs, each output weighs the same: the overall
SQNR comes from the mean of their relative noise powers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.data import Dataset
from calib.inputs import sample_axes
from onnxc.errors import DataError
from onnxc.graph import Model
from onnxc.numerics.intervals import change_interval, share_interval
from onnxc.pairs import Pairing
from onnxc.runtime import Runtime

BATCH = 16  # samples a run where the model takes any batch size
PIECE = 1 << 20  # values that are compared at once
SQNR_CAP = 200.0  # dB reported for equal outputs: past what float64 sums resolve

Array = NDArray[Any]
Pair = tuple[float, float]  # of the reference, of the candidate


@dataclass(frozen=True)
class Fidelity:
    """One output against the reference. agreement: share in 0..1, None without classes."""

    sqnr: float
    cosine: float
    max_abs_error: float
    agreement: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A candidate against its reference; pairs are (reference, candidate), shares are in 0..1.

    agreement, top1, top5 and perplexity are of the first output that has classes. Labels are one a
    sample, or one a token; without labels a language model is judged by its next input token.
    decisions: how many were judged by such a label. flips: of these, how many were right in the
    reference alone (lost), and in the candidate alone (won). Intervals are of 95 %
    (`onnxc.numerics.intervals`), of the agreement as if each sample were one decision.
    """

    samples: int
    outputs: dict[str, Fidelity]
    agreement: float | None = None
    top1: Pair | None = None
    top5: Pair | None = None
    perplexity: Pair | None = None
    notes: tuple[str, ...] = ()
    decisions: int = 0
    flips: tuple[int, int] | None = None

    @property
    def top1_intervals(self) -> tuple[Pair, Pair] | None:
        """Of the reference, of the candidate."""
        return _intervals(self.top1, self.decisions)

    @property
    def top5_intervals(self) -> tuple[Pair, Pair] | None:
        return _intervals(self.top5, self.decisions)

    @property
    def change_interval(self) -> Pair | None:
        """Of the change of top-1, candidate less reference."""
        return None if self.flips is None else change_interval(*self.flips, self.decisions)

    @property
    def agreement_interval(self) -> Pair | None:
        if self.agreement is None:
            return None
        return share_interval(self.agreement * self.samples, self.samples)

    @property
    def sqnr(self) -> float:
        noise = [10 ** (-o.sqnr / 10) for o in self.outputs.values()]
        return decibel(1.0, sum(noise) / len(noise)) if noise else SQNR_CAP

    @property
    def cosine(self) -> float:
        return min((o.cosine for o in self.outputs.values()), default=1.0)

    @property
    def max_abs_error(self) -> float:
        return max((o.max_abs_error for o in self.outputs.values()), default=0.0)


def _intervals(shares: Pair | None, n: int) -> tuple[Pair, Pair] | None:
    if shares is None or not n:
        return None
    return share_interval(shares[0] * n, n), share_interval(shares[1] * n, n)


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise), at most SQNR_CAP; −inf where the noise is not finite."""
    if not math.isfinite(noise):
        return -math.inf
    if noise <= signal * 10 ** (-SQNR_CAP / 10):
        return SQNR_CAP
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def compare(
    reference: Model | Path | bytes,
    candidate: Model | Path | bytes,
    dataset: Dataset,
    runtime: Runtime = Runtime(),
    labels: Array | None = None,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
    other: Runtime | None = None,
) -> Comparison:
    """Run both models over a data set, in batches of `batch` samples (or what the model fixes).

    labels: (N,) or (N, T) integers; those of the data set by default. progress: called with
    (samples done, samples in all). other: how the candidate is run, by default as the reference.
    Raises ModelError where a model does not run or has other
    outputs, DataError where the labels do not fit the samples.
    """
    runs = Pairing(reference, candidate, dataset, runtime, batch, other)
    truth = dataset.labels if labels is None else labels
    if truth is not None and len(truth) != len(dataset):
        raise DataError(f"there are {len(truth)} labels for {len(dataset)} samples")
    are_labels_checked = truth is None
    axes = sample_axes(dataset.inputs)
    tallies = {name: _Tally() for name in runs.names}
    scores = _Scores()
    done, skipped = 0, set[str]()
    for feed, *pair in runs.outputs():
        if truth is not None and not are_labels_checked:
            check_labels(truth, pair[0])
            are_labels_checked = True
        count = next((feed[n].shape[a] for n, a in axes.items() if a is not None), 1)
        for name in runs.names:
            ref, out = (_numbers(outputs.get(name)) for outputs in pair)
            if ref is None or out is None or ref.shape != out.shape:
                skipped.add(name)
                continue
            tallies[name].update(ref, out, one_label=truth is not None and truth.ndim == 1)
            if scores.of(name, ref):
                part = None if truth is None else truth[done : done + count]
                scores.update(ref, out, _targets(part, feed))
        done += count
        if progress is not None:
            progress(done, len(dataset))
    fidelities = {n: t.result() for n, t in tallies.items() if t.elements and n not in skipped}
    notes = [
        f"output {n!r} is not a tensor of one shape and is not compared" for n in sorted(skipped)
    ]
    notes += [
        f"{t.undefined / t.elements:.1%} of output {n!r} of the original are NaN and not compared: "
        f"check the preprocessing and the weights"
        for n, t in tallies.items()
        if t.undefined
    ]
    agreement = next((f.agreement for f in fidelities.values() if f.agreement is not None), None)
    top1, top5, perplexity = scores.result()
    return Comparison(
        *(done, fidelities, agreement, top1, top5, perplexity, tuple(notes)),
        decisions=scores.count,
        flips=scores.flips,
    )


def check_labels(labels: Array, outputs: Mapping[str, Any]) -> None:
    """Raise DataError where labels are no classes of the first output that has classes.

    labels: (N,) or (N, T) integers. outputs: of one run, by name.
    """
    scored = ((name, x) for name, value in outputs.items() if (x := _numbers(value)) is not None)
    rows = ((n, class_scores(x, labels.ndim == 1)) for n, x in scored if x.dtype.kind in "fV")
    name, scores = next(((n, x) for n, x in rows if x.ndim >= 2 and x.shape[-1] > 1), ("", None))
    if scores is None or not labels.size:
        return
    classes = scores.shape[-1]
    if scores.ndim <= labels.ndim or scores.shape[1 : labels.ndim] < labels.shape[1:]:
        raise DataError(
            f"labels of shape {labels.shape} do not fit output {name!r} of shape {scores.shape}: "
            "give one label a sample, or one a token"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        odd = low if low < 0 else high
        raise DataError(
            f"label {odd} is none of the {classes} classes (0 to {classes - 1}) of output "
            f"{name!r}: correct the labels or leave them out"
        )


def _numbers(value: Any) -> Array | None:
    """A tensor of numbers; class probabilities as dicts become rows in the order of their keys."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return np.array([[row[key] for key in sorted(row)] for row in value], np.float64)
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "fiubV" else None


def has_classes(value: Any, one_label: bool = False) -> bool:
    """Whether an output is of float scores, more than one of them in each place."""
    x = _numbers(value)
    if x is None or x.dtype.kind not in "fV":
        return False
    z = class_scores(x, one_label)
    return z.ndim >= 2 and z.shape[-1] > 1


def class_scores(value: Any, one_label: bool = False) -> Array:
    """(…, classes): trailing axes of length 1 dropped, or one row a sample. Of scores alone."""
    x = _numbers(value)
    assert x is not None
    if one_label and x.ndim > 2:
        return x.reshape(len(x), -1)
    while x.ndim > 2 and x.shape[-1] == 1:
        x = x[..., 0]
    return x


@dataclass
class _Tally:
    """Sums over the batches of one output."""

    signal: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    product: float = 0.0
    worst: float = 0.0
    agreed: int = 0
    positions: int = 0
    elements: int = 0
    undefined: int = 0

    def update(self, ref: Array, out: Array, one_label: bool) -> None:
        self.elements += ref.size
        self._agree(class_scores(ref, one_label), class_scores(out, one_label))
        for start in range(0, ref.size, PIECE):
            pieces = (x.reshape(-1)[start : start + PIECE].astype(np.float64) for x in (ref, out))
            self._add(*pieces)

    def _add(self, r: Array, o: Array) -> None:
        self.undefined += int(np.isnan(r).sum())
        usable = np.isfinite(r) & ~((r == o) & np.isinf(r))
        r, o = r[usable], o[usable]
        error = np.abs(r - o)
        self.signal += float(r @ r)
        self.noise += float(error @ error)
        self.energy += float(o @ o)
        self.product += float(r @ o)
        self.worst = max(self.worst, float(error.max(initial=0.0)))

    def _agree(self, ref: Array, out: Array) -> None:
        if ref.dtype.kind in "iub":  # already decisions: labels, masks
            self.positions += ref.size
            self.agreed += int((ref == out).sum())
        elif ref.ndim >= 2 and ref.shape[-1] > 1 and ref.size:
            same = ref.argmax(-1) == out.argmax(-1)
            self.positions += same.size
            self.agreed += int(same.sum())

    def result(self) -> Fidelity:
        norm = math.sqrt(self.signal * self.energy)
        cosine = self.product / norm if norm else float(self.signal == self.energy)
        agreement = self.agreed / self.positions if self.positions else None
        return Fidelity(decibel(self.signal, self.noise), cosine, self.worst, agreement)


@dataclass
class _Scores:
    """Top-1, top-5 and next-token likelihood of the first output with classes, for both models."""

    name: str | None = None
    is_tokens: bool = False
    hits: Array = field(
        default_factory=lambda: np.zeros((2, 2), np.int64)
    )  # model x (top-1, top-5)
    surprise: Array = field(default_factory=lambda: np.zeros(2))  # Σ −log p
    count: int = 0
    lost: int = 0
    won: int = 0

    def of(self, name: str, ref: Array) -> bool:
        if self.name is None and ref.dtype.kind in "fV" and class_scores(ref).ndim >= 2:
            self.name = name if class_scores(ref).shape[-1] > 1 else None
        return self.name == name

    def update(self, ref: Array, out: Array, targets: Array | None) -> None:
        if targets is None:
            return
        right = []
        for row, logits in enumerate((ref, out)):
            scores = _aligned(logits, targets)
            if scores is None:
                return
            right.append(scores.argmax(-1) == targets)
            self.hits[row] += int(right[row].sum()), _among_five(scores, targets)
            if targets.ndim == 2:
                self.is_tokens = True
                self.surprise[row] += surprise(scores, targets).sum()
        self.count += targets.size
        self.lost += int((right[0] & ~right[1]).sum())
        self.won += int((right[1] & ~right[0]).sum())

    @property
    def flips(self) -> tuple[int, int] | None:
        return (self.lost, self.won) if self.count else None

    def result(self) -> tuple[Pair | None, Pair | None, Pair | None]:
        """top-1, top-5 and perplexity, each (reference, candidate)."""
        if not self.count:
            return None, None, None
        first, fifth = (_pair(column) for column in self.hits.T / self.count)
        mean = _pair(np.exp(self.surprise / self.count))
        return first, fifth, mean if self.is_tokens else None


def _pair(both: Array) -> Pair:
    return float(both[0]), float(both[1])


def _targets(labels: Array | None, feed: dict[str, Array]) -> Array | None:
    """The right classes: the labels, or the next tokens of a single (N, T) integer input."""
    return next_tokens(feed) if labels is None else labels


def next_tokens(feed: Mapping[str, Any]) -> Array | None:
    """(N, T - 1) tokens to be foretold, where a single (N, T) integer input holds them."""
    tokens = [x for x in feed.values() if x.ndim == 2 and x.dtype.kind in "iu"]
    return tokens[0][:, 1:] if len(tokens) == len(feed) == 1 else None


def _aligned(logits: Array, targets: Array) -> Array | None:
    """(…, classes) scores, one row a target; None where the shapes do not fit."""
    scores = class_scores(logits, one_label=targets.ndim == 1)
    if targets.ndim == 2:
        scores = scores[:, : targets.shape[1]]
    fits = scores.shape[:-1] == targets.shape and targets.size
    return scores if fits and targets.min() >= 0 and targets.max() < scores.shape[-1] else None


def _among_five(scores: Array, targets: Array) -> int:
    """How many targets have fewer than five scores above their own."""
    own = np.take_along_axis(scores, targets[..., None].astype(np.int64), -1)
    return int(((scores > own).sum(-1) < 5).sum())


def surprise(scores: Array, targets: Array) -> Array:
    """−log softmax of the targets, in their shape. scores: (…, classes)."""
    z = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    own = np.take_along_axis(z, targets[..., None].astype(np.int64), -1)[..., 0]
    return np.asarray(np.log(np.exp(z).sum(-1)) - own)
