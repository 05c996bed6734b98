"""How far a tensor moved, channel by channel, summed over batches in float64.

    SQNR = 10 log10(Σ x² / Σ (x − z)²)           z standing for x

Passes such as equalization leave what a network computes but not what its tensors hold: channel c
of z is a_c x + b_c. Where the least-squares fit

    a_c = cov(x, z) / var(x),    b_c = E[z] − a_c E[x],    noise_c = (Σ (z − E z)² − a_c cov) / a_c²

removes REMOVED dB of the error and the gains differ from channel to channel, the tensor was scaled,
and its error is what the fit leaves. No rounding and no clipping makes that of an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.fidelity import decibel

Array = NDArray[Any]

REMOVED = 6.0  # dB that a fit must take from the error, to be more than chance
UNEVEN = 0.03  # mean distance of log2 of the gains, in octaves, beyond which channels are scaled
LOST = 1e-3  # of a gain: nothing is left of the channel


@dataclass
class Relative:
    """The power of what was compared, and of the errors in it."""

    power: float = 0.0
    noise: float = 0.0

    def update(self, x: Array, z: Array) -> None:
        x = x.astype(np.float64)
        self.power += float((x**2).sum())
        self.noise += float(((x - z) ** 2).sum())

    @property
    def sqnr(self) -> float:
        return decibel(self.power, self.noise)


@dataclass(frozen=True)
class Fit:
    """z = gain x + offset by channel of an axis."""

    gain: Array
    offset: Array
    axis: int

    def __call__(self, x: Array) -> Array:
        """x as the rewritten graph holds it."""
        shape = [1] * x.ndim
        shape[self.axis] = -1
        moved = x * self.gain.reshape(shape) + self.offset.reshape(shape)
        return np.asarray(moved, x.dtype)

    def undone(self, z: Array) -> Array:
        """z as the original holds it; a channel of which nothing is left stays as it is."""
        shape = [1] * z.ndim
        shape[self.axis] = -1
        gain = np.where(np.abs(self.gain) > LOST, self.gain, 1.0)
        return np.asarray((z - self.offset.reshape(shape)) / gain.reshape(shape), np.float64)


class Distortion:
    """The sums of one pair of tensors. axis: of the channels. low, high: the range of x."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0
        self.noise = 0.0
        self.low, self.high = np.inf, -np.inf
        self.sums: dict[str, Array] = {}

    def update(self, x: Array, z: Array) -> None:
        """Add a batch; both of one shape."""
        x, z = (self._by_channel(t) for t in (x, z))
        self.count += x.shape[1]
        self.low = min(self.low, float(x.min(initial=np.inf)))
        self.high = max(self.high, float(x.max(initial=-np.inf)))
        self.noise += float(((x - z) ** 2).sum())
        found = {"x": x, "z": z, "xx": x * x, "xz": x * z, "zz": z * z}
        for name, values in found.items():
            total = values.sum(axis=1)
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def _by_channel(self, x: Array) -> Array:
        """(channels, values), float64."""
        if x.ndim < 2:
            return x.reshape(1, -1).astype(np.float64)
        channels = x.shape[self.axis]
        return np.moveaxis(x, self.axis, 0).reshape(channels, -1).astype(np.float64)

    @property
    def power(self) -> float:
        """Σ x²."""
        return float(self.sums["xx"].sum()) if self.sums else 0.0

    @property
    def plain(self) -> float:
        """SQNR in dB of the values as they are."""
        return decibel(self.power, self.noise)

    @property
    def sqnr(self) -> float:
        """SQNR in dB; of a tensor that was scaled, what the fit leaves."""
        fitted = self._fitted() if self.count > 1 else None
        return self.plain if fitted is None else fitted[0]

    @property
    def fit(self) -> Fit | None:
        """How a tensor was scaled; None where it was not."""
        fitted = self._fitted() if self.count > 1 else None
        return None if fitted is None else Fit(fitted[1], fitted[2], self.axis)

    def _fitted(self) -> tuple[float, Array, Array] | None:
        """SQNR behind the fit, gains and offsets, where a tensor was scaled."""
        n, s = self.count, self.sums
        var = np.maximum(s["xx"] - s["x"] ** 2 / n, 0.0)
        cov = s["xz"] - s["x"] * s["z"] / n
        spread = np.maximum(s["zz"] - s["z"] ** 2 / n, 0.0)
        moves = var > 1e-12 * np.maximum(s["xx"], 1e-300)
        gain = np.where(moves, cov / np.where(moves, var, 1.0), 1.0)
        offset = (s["z"] - gain * s["x"]) / n
        alive = moves & (gain > LOST)
        if not alive.any() or _unevenness(gain[alive], s["xx"][alive]) < UNEVEN:
            return None
        left = np.maximum(spread - gain * cov, 0.0) / np.where(alive, gain, 1.0) ** 2
        noise = float(np.where(alive, left, np.where(moves, var, 0.0)).sum())
        sqnr = decibel(self.power, noise)
        return (sqnr, gain, offset) if sqnr >= self.plain + REMOVED else None


def _unevenness(gains: Array, powers: Array) -> float:
    """Mean distance of log2 of gains from their mean, each channel by its power."""
    octaves = np.log2(gains)
    shares = powers / max(float(powers.sum()), 1e-300)
    return float(shares @ np.abs(octaves - shares @ octaves))
