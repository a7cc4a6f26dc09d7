"""How vectors of several boards become one: by weights, or robustly, so that one board in five can send what it likes.

A board's vector is what it would move the fleet by. It is first scaled down to the median of all boards' norms (norm
clipping; Sun et al. 2019 with a bound that needs no tuning): whoever sends a hundred times as much counts once. Then:

mean     weighted by numbers of examples, FedAvg (McMahan et al. 2017). Boards say these numbers themselves.
trimmed  coordinate by coordinate the largest and the smallest values are left out and the others averaged (Yin et al.
         2018); every board counts alike. With n boards, k = max(1, floor(trim n)) at either end from three boards on.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROBUST = ("mean", "trimmed")


def shares(examples: Sequence[int | None]) -> list[float]:
    """Each board's share by its examples; all alike where one does not say how many it has."""
    counts = [max(0, n) for n in examples if n is not None]
    if len(counts) < len(examples) or not sum(counts):
        return [1.0 / len(examples)] * len(examples)
    return [n / sum(counts) for n in counts]


def scales(norms: Sequence[float]) -> list[float]:
    """What each vector is multiplied by, so that none is longer than the median one. Of two, the shorter one's norm."""
    ordered = sorted(norms)
    bound = ordered[(len(ordered) - 1) // 2]
    return [min(1.0, bound / norm) if norm > 0 else 1.0 for norm in norms]


def trimmed_count(n: int, trim: float) -> int:
    """How many of `n` values are left out at either end; some are always left."""
    return min(max(1, math.floor(trim * n)), (n - 1) // 2) if n >= 3 else 0


def combine(values: Array, examples: Sequence[int | None], robust: str, trim: float) -> Array:
    """Rows (boards, ...) to one (...)."""
    if robust == "mean":
        return np.tensordot(np.asarray(shares(examples)), values, axes=1)
    k = trimmed_count(len(values), trim)
    ordered = np.sort(values, axis=0)
    return ordered[k : len(values) - k].mean(axis=0)
