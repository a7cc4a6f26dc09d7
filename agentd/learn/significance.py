"""Is the candidate better than what serves now? Paired tests on the same holdout examples, exact where they can be."""

import itertools
import math
import operator
import random
import statistics
from collections.abc import Sequence

_EXACT_PAIRS = 14
_SAMPLES = 9999
_CHUNK = 8


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """One-sided exact McNemar test with the mid-p correction: the p-value of "after is not better than before".

    `before[i]` and `after[i]` say whether example i was answered correctly. Only the discordant pairs count: with b
    examples won and c lost, b is Binomial(b + c, 1/2) under the null, and p = P(X > b) + P(X = b) / 2 (Fagerland,
    Lydersen and Laake 2013, who recommend the mid-p version: the plain exact test is needlessly conservative).
    Nothing won or lost gives 0.5. Raises ValueError when the lengths differ.
    """
    pairs = list(zip(before, after, strict=True))
    won = sum(1 for old, new in pairs if new and not old)
    lost = sum(1 for old, new in pairs if old and not new)
    n = won + lost
    # Twice the tail in whole numbers: one division, so no rounding before it.
    doubled = 2 * sum(math.comb(n, x) for x in range(won + 1, n + 1)) + math.comb(n, won)
    return doubled / (1 << (n + 1))


def paired_permutation(before: Sequence[float], after: Sequence[float], seed: int) -> float:
    """One-sided paired permutation test: the p-value of "the mean of `after` is not below the mean of `before`".

    For losses: small p means that the loss went down. The sign of each difference is flipped; all 2**n flips are
    taken for up to 14 pairs, else 9999 drawn from `seed`, and then p = (1 + count) / 10000 is valid at any sample size
    (Phipson and Smyth 2010). Deterministic. Raises ValueError when lengths differ or a value is not finite.
    """
    gains = [old - new for old, new in zip(before, after, strict=True)]
    if not all(math.isfinite(gain) for gain in gains):
        raise ValueError("a paired test needs finite values")
    gains = [gain for gain in gains if gain != 0.0]
    if not gains:
        return 1.0
    # Sums of the same numbers in another order differ in the last bits; a tie must still count as one.
    observed = math.fsum(gains) - 1e-12 * math.fsum(abs(gain) for gain in gains)
    if len(gains) <= _EXACT_PAIRS:
        flips = itertools.product((1.0, -1.0), repeat=len(gains))
        count = sum(math.fsum(map(operator.mul, gains, signs)) >= observed for signs in flips)
        return count / (1 << len(gains))
    # The 256 sign patterns of every 8 gains are summed once; a sample is then n / 8 look-ups.
    tables = [_signed_sums(gains[start : start + _CHUNK]) for start in range(0, len(gains), _CHUNK)]
    generator = random.Random(seed)
    count = 0
    for _ in range(_SAMPLES):
        pattern = generator.randbytes(len(tables))
        count += sum(table[byte] for table, byte in zip(tables, pattern, strict=True)) >= observed
    return (1 + count) / (1 + _SAMPLES)


def signed_rank(before: Sequence[float], after: Sequence[float], seed: int) -> float:
    """One-sided Wilcoxon signed-rank test: the p-value of "values of `after` are not below those of `before`".

    Of losses, whose mean is ruled by a few examples with tokens of 20 nats: of a difference its rank alone counts. The
    same sign flips as in `paired_permutation`, on ranks; ties share the mean of theirs. Raises ValueError when lengths
    differ or a value is not finite.
    """
    gains = [old - new for old, new in zip(before, after, strict=True)]
    if not all(math.isfinite(gain) for gain in gains):
        raise ValueError("a paired test needs finite values")
    gains = sorted((gain for gain in gains if gain != 0.0), key=abs)
    ranks: list[float] = []
    for _, tied in itertools.groupby(gains, key=abs):
        signs = [math.copysign(1.0, gain) for gain in tied]
        rank = len(ranks) + (len(signs) + 1) / 2
        ranks += [rank * sign for sign in signs]
    return paired_permutation(ranks, [0.0] * len(ranks), seed)


def welch(first: Sequence[float], second: Sequence[float]) -> float:
    """One-sided Welch test of independent samples: the p-value of "the mean of `first` is not above that of `second`".

    With the normal distribution in place of Student's, which for 20 and more values a side is close. Fewer than two
    values on a side tell nothing: 1.
    """
    if min(len(first), len(second)) < 2:
        return 1.0
    difference = statistics.fmean(first) - statistics.fmean(second)
    variance = statistics.variance(first) / len(first) + statistics.variance(second) / len(second)
    if not variance:
        return 0.0 if difference > 0 else 1.0
    return 1.0 - statistics.NormalDist().cdf(difference / math.sqrt(variance))


def _signed_sums(gains: Sequence[float]) -> list[float]:
    return [
        math.fsum(gain if pattern >> bit & 1 else -gain for bit, gain in enumerate(gains))
        for pattern in range(1 << _CHUNK)
    ]
