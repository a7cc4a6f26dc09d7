"""What was answered since the daemon's start, as GET /metrics tells it: tokens, and how long answers took."""

from bisect import bisect_left
from itertools import accumulate

from agentd.engine.protocol import Piece

FIRST_TOKEN = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds
ANSWER = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds


class Histogram:
    """Seconds, by how many were at most each of `bounds`."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many were at most that), as Prometheus has them."""
        return list(zip([*map(str, self.bounds), "+Inf"], accumulate(self._counts), strict=True))


class Traffic:
    """Of answers that have ended."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.first_token, self.answer = Histogram(FIRST_TOKEN), Histogram(ANSWER)

    def observe(self, last: Piece, first_token: float, answer: float) -> None:
        """`last` is an answer's last piece; seconds since the request came."""
        self.prompt_tokens += last.prompt_tokens - last.cached_tokens
        self.cached_tokens += last.cached_tokens
        self.completion_tokens += last.completion_tokens
        self.first_token.observe(first_token)
        self.answer.observe(answer)
