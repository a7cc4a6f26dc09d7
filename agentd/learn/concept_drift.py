"""When two labels change places: what was said of one input is now said of the other's.

Given and right labels go together: of judged answers more are right than if the right labels were shuffled among them.
Once what people mean has turned round, fewer are. That is more than a loss of accuracy: inputs of a new kind make a
model worse, and so does a share of wrong corrections, but neither makes it worse than chance (concept drift, as against
a drift of the inputs: Gama et al. 2014; the test of each side is Fisher's exact one, 1935).

Who used to confirm answers, and now corrects the wrong ones alone, seems to say the opposite as well. So answers that
would have been judged if people judged as often as before count as right ones.

Standard library only.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

_ALPHA = 0.01  # of both tests; that of the time after is divided by all the places and pairs that are looked at
_DAYS = 2  # with judged answers, at least, on either side: one day's mistake, or one flood, is no change


@dataclass(frozen=True)
class JudgedAnswer:
    """A label that was given on a day (2026-01-31), and the right one."""

    day: str
    given: str
    right: str


@dataclass(frozen=True)
class ConceptDrift:
    """From `day` on, these two labels are what the other one was."""

    day: str
    labels: tuple[str, str]


def changed_places(answers: Sequence[JudgedAnswer], served: Mapping[str, int]) -> ConceptDrift | None:
    """The likeliest change in these answers, if there is one; `served` is how many there were each day, judged or
    not."""
    cells: dict[tuple[str, str], list[JudgedAnswer]] = {}
    for answer in answers:
        cells.setdefault((answer.given, answer.right), []).append(answer)
    found: list[tuple[float, str, tuple[str, str]]] = []
    n_tests = 0  # but for pairs that were never taken for each other, which cannot be found (Tarone 1990)
    for pair in sorted((a, b) for a, b in cells if a < b and (b, a) in cells):
        among = [answer for cell in product(pair, pair) for answer in cells.get(cell, ())]
        days = sorted({answer.day for answer in among})
        for day in days[_DAYS : len(days) - _DAYS + 1]:
            n_tests += 1
            before = _table((answer for answer in among if answer.day < day), pair)
            if before.p_together <= _ALPHA:
                after = _table((answer for answer in among if answer.day >= day), pair)
                found.append((after.with_right_ones(_unjudged(answers, served, day)).p_apart, day, pair))
    if not found:
        return None
    p, day, pair = min(found)
    return ConceptDrift(day, pair) if p * n_tests <= _ALPHA else None


def _unjudged(answers: Sequence[JudgedAnswer], served: Mapping[str, int], day: str) -> int:
    """How many more answers since this day would have been judged, had people judged as many of them as before."""
    judged = [sum(answer.day < day for answer in answers), sum(answer.day >= day for answer in answers)]
    given = [sum(n for each, n in served.items() if each < day), sum(n for each, n in served.items() if each >= day)]
    return max(0, round(given[1] * judged[0] / given[0]) - judged[1]) if given[0] else 0


@dataclass(frozen=True)
class _Table:
    """Answers by the given label and the right one, of a pair: both the first, first and second, and so on."""

    both_first: int
    first_second: int
    second_first: int
    both_second: int

    @property
    def p_together(self) -> float:
        """Of "no more are right than by chance"."""
        return math.fsum(self._chances(self.both_first, self._most))

    @property
    def p_apart(self) -> float:
        """Of "no fewer are right than by chance"."""
        return math.fsum(self._chances(self._least, self.both_first))

    def with_right_ones(self, n: int) -> "_Table":
        """With so many more right ones, of both labels as often as they were given."""
        first = self.both_first + self.first_second
        given = first + self.second_first + self.both_second
        more = round(n * first / given) if given else 0
        return _Table(self.both_first + more, self.first_second, self.second_first, self.both_second + n - more)

    @property
    def _margins(self) -> tuple[int, int, int]:
        """First given, first right, all."""
        first = self.both_first + self.first_second
        return first, self.both_first + self.second_first, first + self.second_first + self.both_second

    @property
    def _least(self) -> int:
        given, right, n = self._margins
        return max(0, given + right - n)

    @property
    def _most(self) -> int:
        given, right, _ = self._margins
        return min(given, right)

    def _chances(self, low: int, high: int) -> list[float]:
        """Of each number of answers that are both the first, from `low` to `high`: hypergeometric."""
        given, right, n = self._margins
        ways = math.comb(n, right)
        return [math.comb(given, k) * math.comb(n - given, right - k) / ways for k in range(low, high + 1)]


def _table(answers: Iterable[JudgedAnswer], pair: tuple[str, str]) -> _Table:
    counts = Counter((answer.given == pair[0], answer.right == pair[0]) for answer in answers)
    return _Table(counts[True, True], counts[True, False], counts[False, True], counts[False, False])
