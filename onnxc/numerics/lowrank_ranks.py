"""How low a rank may be: rules for one layer, where layers share no budget.

    energy:E   the smallest that keeps a share E of the energy of the outputs, error ≤ 1 − E
    sqnr:D     the smallest that keeps D dB of the layer's own output, error ≤ 10^(−D/10)
    vbmf       the components of the unfolded weight that stand out of noise (Kim 2016)

The error is E‖(W − Ŵ) x‖² / E‖W x‖². Ranks are those of kernels of a multiple of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxc.numerics import vbmf
from onnxc.numerics.lowrank import factorize, macs, ranks
from onnxc.numerics.lowrank_structures import STRUCTURES
from onnxc.numerics.multilinear import Floats

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """name: energy, sqnr or vbmf. amount: E or D; nothing to vbmf."""

    name: str
    amount: float = 0.0

    @classmethod
    def read(cls, text: str) -> Rule:
        """Raises ValueError for text that is no rule."""
        name, _, number = text.partition(":")
        amount = float(number) if number else 0.0
        is_fine = {"energy": 0 < amount < 1, "sqnr": amount > 0, "vbmf": not number}
        if not is_fine.get(name, False):
            raise ValueError("a rule for ranks is energy:SHARE, sqnr:DB or vbmf")
        return cls(name, amount)

    @property
    def error(self) -> float:
        """The most that may be lost."""
        return 1 - self.amount if self.name == "energy" else float(10 ** (-self.amount / 10))

    def why_not(self, method: str) -> str:
        """Why it has no ranks for a structure; empty where it has."""
        if self.name == "vbmf" and STRUCTURES[method].unfold is None:
            return f"the ranks of {method} are not those of a matrix, which vbmf is for"
        return ""

    def ranks(
        self, method: str, W: Floats, H: Floats | None, strides: Ints = (), multiple: int = 1
    ) -> Ints | None:
        """The ranks for W (groups, o, c, *kernel); None where they would save no MACs."""
        shape = W.shape
        allowed = [r for r in ranks(method, shape, multiple) if macs(method, shape, r, strides) < 1]
        if self.name == "vbmf":
            return _above(allowed, _components(method, W))
        return _smallest(method, W, H, allowed, self.error)


def _components(method: str, W: Floats) -> Ints:
    """What vbmf gives for each rank, the largest of all groups."""
    unfold = STRUCTURES[method].unfold
    assert unfold is not None
    each = [[vbmf.rank(matrix) for matrix in unfold(w)] for w in W]
    return tuple(map(max, zip(*each, strict=True)))


def _above(allowed: Sequence[Ints], wanted: Ints) -> Ints | None:
    fits = (r for r in allowed if all(a >= b for a, b in zip(r, wanted, strict=True)))
    return next(fits, None)


def _smallest(
    method: str, W: Floats, H: Floats | None, allowed: Sequence[Ints], error: float
) -> Ints | None:
    """The first ranks that lose no more, by halving: with growing ranks less is lost."""
    low, high = 0, len(allowed)
    while low < high:
        middle = (low + high) // 2
        if factorize(method, W, H, allowed[middle]).error <= error:
            high = middle
        else:
            low = middle + 1
    return allowed[low] if low < len(allowed) else None
