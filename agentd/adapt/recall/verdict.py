"""Whether past corrections in the prompt help, and how many of them do best. Pure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentd.learn.significance import mcnemar, signed_rank

COUNTS = (1, 2, 4, 8)
"""Numbers of corrections that are tried."""
_FEW = 0.125  # level where training examples are judged, each by the others: two more right, and none lost
_STAYS = 0.25  # level at which what was switched on stays so: a test at the level of switching on would flicker


@dataclass(frozen=True)
class Answers:
    """How the examples came out with one number of corrections: whether each was right (None: no answer in time), or
    where answers have no right or wrong the losses of the right ones in nats per token; and seconds per example."""

    hits: Sequence[bool | None] = ()
    losses: Sequence[float] = ()
    seconds: float = 0.0

    def value(self, at: Sequence[int]) -> float:
        """Higher is better: the share of hits, or the negative median loss."""
        if self.losses:
            return -statistics.median(self.losses[i] for i in at)
        return sum(bool(self.hits[i]) for i in at) / len(at)


@dataclass(frozen=True)
class Judgement:
    """Whether recall is to be on, with how many corrections, why, and the figures."""

    active: bool
    k: int | None
    reason: str
    figures: dict[str, Any]


def judge(
    without: Answers, with_: Mapping[int, Answers], *, held_out: bool, alpha: float, on: bool, seed: int
) -> Judgement:
    """`with_` has the answers by number of corrections. Held-out examples must show it at `alpha`, divided by the
    numbers that were tried; while there are few of these, training examples, each answered by help of the others, at a
    level that a handful can reach. What is `on` stays so while it seems to help."""
    n = max(len(without.hits), len(without.losses))
    at = [i for i in range(n) if all(_known(answers, i) for answers in (without, *with_.values()))]
    source = "held-out examples" if held_out else "corrections, each by help of the others"
    if not at or not with_:
        return Judgement(False, None, "nothing could be answered", {"n": 0})
    k = max(with_, key=lambda k: (with_[k].value(at), -k))
    p = _p(without, with_[k], at, seed)
    level = min(1.0, p * len(with_)) if held_out else p
    limit = _STAYS if on else alpha if held_out else _FEW
    better = with_[k].value(at) > without.value(at)
    active = better and level <= limit
    what = "accuracy" if without.hits else "loss"
    before, after = abs(without.value(at)), abs(with_[k].value(at))
    reason = (
        f"{what} {before:.3f} → {after:.3f} with {k} corrections, on {len(at)} {source}"
        f" (p {level:.3g}, needed {limit:.3g})"
    )
    figures = {
        "n": len(at),
        "source": "holdout" if held_out else "corrections",
        "measure": what,
        "without": before,
        "with": {str(k): abs(answers.value(at)) for k, answers in sorted(with_.items())},
        "p": level,
        "seconds": {str(k): round(a.seconds, 4) for k, a in sorted({0: without, **with_}.items())},
    }
    return Judgement(active, k, reason, figures)


def _known(answers: Answers, i: int) -> bool:
    return math.isfinite(answers.losses[i]) if answers.losses else answers.hits[i] is not None


def _p(without: Answers, with_: Answers, at: Sequence[int], seed: int) -> float:
    if without.losses:
        return signed_rank([without.losses[i] for i in at], [with_.losses[i] for i in at], seed)
    return mcnemar([bool(without.hits[i]) for i in at], [bool(with_.hits[i]) for i in at])
