"""The strategy *ledger*: what the fleet has learned is a number for each of a bounded pool of directions.

z(seed) is the same on every board, so weights that zeroth-order steps led to are the base plus a sum over seeds, and to
average boards' weights is to average their numbers, exactly (FedKSeed, Qin et al. 2024, ICML). A round uses `width`
seeds of the pool, the next round those that follow, and when all have been used they come again: numbers add up, and
the ledger that a board replays never has more steps than the pool has seeds. So a board that was away catches up with
one file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agentd_flower.aggregate import combine, scales
from agentd_flower.wire import Unusable

BOTTOM = 1 << 40  # the pool's first seed; agentd's own passes count from elsewhere
MAX_NORM = 1e3  # of a board's numbers in a round; weights move by far less


@dataclass(frozen=True)
class Pool:
    """`size` seeds, of which a round has `width`. Raises ValueError."""

    size: int
    width: int

    def __post_init__(self) -> None:
        if not 8 <= self.width <= self.size or self.size % self.width:
            raise ValueError(f"a pool of {self.size} seeds is no multiple of a round's {self.width}")

    def first(self, number: int) -> int:
        """The first seed of a round, whose numbers count from 1."""
        return BOTTOM + (number - 1) * self.width % self.size


def vector(steps: Mapping[int, float], first: int, width: int) -> list[float]:
    """A board's numbers for the round's directions, 0 where it took no step. Raises Unusable for other directions,
    which a replay of an earlier round has, and for what is far too long."""
    if strange := sorted(seed for seed in steps if not first <= seed < first + width):
        raise Unusable(f"seed {strange[0]} is none of this round's")
    numbers = [steps.get(seed, 0.0) for seed in range(first, first + width)]
    if not float(np.linalg.norm(numbers)) <= MAX_NORM:
        raise Unusable("its steps are far too long")
    return numbers


def averaged(
    vectors: Sequence[Sequence[float]], examples: Sequence[int | None], robust: str, trim: float
) -> list[float]:
    """What the round moves the fleet by along its directions."""
    rows = np.asarray(vectors, np.float64)
    rows *= np.asarray(scales([float(norm) for norm in np.linalg.norm(rows, axis=1)]))[:, None]
    return [float(value) for value in combine(rows, examples, robust, trim)]


def added(total: Mapping[int, float], first: int, round_: Sequence[float]) -> dict[int, float]:
    """What the fleet has come to, with one more round."""
    sums = dict(total)
    for place, value in enumerate(round_):
        if value:
            sums[first + place] = sums.get(first + place, 0.0) + value
    return sums
