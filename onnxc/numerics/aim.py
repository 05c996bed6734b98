"""What a weight that must be of some kind, such as of few values, is best fitted to.

Of rows x̂ and goals t, with the best plain weight W* (`onnxc.numerics.refit`), the error of another
weight is

    E‖t − Ŵ x̂ − b̂‖² = const + tr (W* − Ŵ) C (W* − Ŵ)ᵀ,    C = H,    b̂ = E[t] − Ŵ E[x̂],

so that Ŵ is fitted to W* in the metric C. W* comes with a ridge, for it is estimated; C is shrunk
as little as its rows ask for (`onnxc.numerics.covariance`), for a Ŵ that is far from W* loses most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.covariance import shrunk
from onnxc.numerics.refit import Sums, refit
from onnxc.numerics.sparse import Quadratic

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Aim:
    """W: what to approach, (groups, outputs, d), in the metric E.

    x, t: the means of rows and goals, (groups, d) and (groups, outputs). power: E‖t − E[t]‖².
    """

    W: Floats
    E: Quadratic
    x: Floats
    t: Floats
    power: float

    @classmethod
    def of(cls, folds: Sequence[Sums], W: Floats, b: Floats, is_biased: bool) -> Aim:
        """W, b: as they are. is_biased: the bias may change."""
        best = refit(folds, W, b, is_biased)
        sums = folds[0] + folds[1]
        m = sums.moments(is_biased)
        peak = float(np.abs(W).max(initial=0))
        goal = np.clip(best.W, -peak, peak)  # beyond lies what next to nothing comes in for
        metric = Quadratic((shrunk(m.H, sums.count),))
        return cls(goal, metric, m.x, m.t, float(sums.variance().sum()))

    def bias(self, found: Floats) -> Floats:
        """b̂ of another weight, (groups, outputs)."""
        return np.asarray(self.t - np.einsum("god,gd->go", found, self.x))

    def error(self, found: Floats) -> float:
        """What another weight loses more than W* does, as a share of the power of t."""
        return self.E.error(self.W - found) / max(self.power, 1e-300)
