"""Confidence intervals of shares, and of the difference of two shares of the same samples.

Of k hits in n samples, p = k / n, the score interval of Wilson (1927) holds all π with

    |p − π| ≤ z √(π (1 − π) / n),

    (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n).

Two models that judge the same samples differ on few: on b of them the first alone is right (lost),
on c the second alone (won). What both get right or wrong tells nothing. The score interval of Tango
(1998) for the change δ of the share of hits holds all δ with

    |c − b − n δ| ≤ z √(n (q₁ + q₂ − δ²)),      q₂ = q₁ + δ,

q₁ the likeliest share of lost samples if the change were δ, the larger root of

    2n q² + (2n δ − b − c − (c − b) δ) q − b δ (1 − δ) = 0.

It is right for few samples too, and for none that differ, where it is ± z² / (n + z²).
"""

from __future__ import annotations

import math

Z = 1.959963984540054  # of 95 %
STEPS = 60  # halvings of an interval of length 1: to the last bits of a float


def share_interval(hits: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share, of `hits` of n > 0 samples; (0, 1) where n is 0."""
    if n <= 0:
        return 0.0, 1.0
    p, unit = hits / n, z * z / n
    half = z * math.sqrt(max(p * (1 - p), 0.0) / n + unit / (4 * n))
    low, high = ((p + unit / 2 + sign * half) / (1 + unit) for sign in (-1, 1))
    return (0.0 if hits <= 0 else max(low, 0.0)), (1.0 if hits >= n else min(high, 1.0))


def change_interval(lost: int, won: int, n: int, z: float = Z) -> tuple[float, float]:
    """Tango's interval of (won − lost) / n, the change of a share; (−1, 1) where n is 0."""
    if n <= 0:
        return -1.0, 1.0
    return -_rise(won, lost, n, z), _rise(lost, won, n, z)


def score(lost: int, won: int, n: int, change: float) -> float:
    """How many standard errors the observed change lies above `change`, in −1..1."""
    distance = won - lost - n * change
    q = likeliest(lost, won, n, change)
    variance = n * (2 * q + change - change * change)
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def likeliest(lost: int, won: int, n: int, change: float) -> float:
    """q₁: the likeliest share of lost samples if the change were `change`."""
    middle = 2 * n * change - lost - won - (won - lost) * change
    rest = -lost * change * (1 - change)
    root = math.sqrt(max(middle * middle - 8 * n * rest, 0.0))
    return max((root - middle) / (4 * n), 0.0, -change)


def _rise(lost: int, won: int, n: int, z: float) -> float:
    """The upper end: the largest change that the observed one lies at most z errors below."""
    low, high = (won - lost) / n, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        is_inside = score(lost, won, n, middle) >= -z
        low, high = (middle, high) if is_inside else (low, middle)
    return low
