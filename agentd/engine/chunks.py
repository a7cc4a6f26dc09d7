"""Where prompts are cut into pieces that are computed at once, and so how much of one another one may take over.

The places are fixed: rounding depends on how many tokens of a sequence are computed together, and an exact answer
(serving.py) must not depend on what was in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agentd.limits import PROMPT_PIECE


@dataclass(frozen=True)
class ChunkBoundaries:
    """Prompts are cut at the positions `at`, and beyond the last of these at its multiples."""

    at: tuple[int, ...] = (32, 64, 96, 128, 192, PROMPT_PIECE)

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return self.at[-1]

    def after(self, position: int) -> int:
        """The first boundary after `position`."""
        return next((end for end in self.at if end > position), (position // self.longest + 1) * self.longest)

    def reusable(self, n: int) -> int:
        """How many of `n` equal leading tokens may be taken from the cache: up to the last boundary."""
        if n >= self.longest:
            return n // self.longest * self.longest
        return max((end for end in self.at if end <= n), default=0)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
