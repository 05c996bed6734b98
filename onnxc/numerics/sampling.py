"""A few positions of each sample, evenly spread, from a start that the sample itself decides.

Of n positions those at (start + i · stride) mod n are taken. The stride is coprime to n, so that no
row, column or channel of an image is favoured. The start looks random but is a checksum of the
sample's own values: neither order, batch nor process changes it, and what is rare and always in
one place, such as the border of an image, gets its share over many samples.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PROBES = 64  # values behind the checksum


def stride(count: int, wanted: int) -> int:
    """The least stride that leaves at most `wanted` of `count` positions and is coprime to it."""
    step = max(-(-count // wanted), 1)
    while math.gcd(step, count) > 1 and step > 1:
        step += 1
    return step


def start(sample: Array, step: int) -> int:
    """Where to start in a sample, below `step`."""
    if step == 1:
        return 0
    flat = sample.reshape(-1)
    return zlib.crc32(flat[:: max(flat.size // PROBES, 1)].tobytes()) % step


def spread(count: int, step: int, begin: int = 0) -> NDArray[np.intp]:
    """The positions: ⌈count / step⌉ of 0 … count − 1, all different."""
    return (begin + step * np.arange(-(-count // step), dtype=np.intp)) % max(count, 1)
