"""Which examples the others speak against: feedback is partly wrong, and three epochs learn mistakes by heart.

An answer y was given to its input x, with the likelihood p(y | x) that the model gives it, or it was said regardless of
that (and may be right by chance), with the likelihood u(y) that it has among all answers of its task:

    (1 - e) p(y | x) + e u(y),    e the share of those said regardless.

Going up the log of that is going up log p(y | x), weighted by the probability that the answer is to its input,

    w = (1 - e) p / ((1 - e) p + e u),

so that nothing is learned by heart which the others make less likely than chance does: a noise model as in Sukhbaatar
et al. 2015, with expectation maximisation over one share (Dempster, Laird and Rubin 1977). No threshold is set. Where
all answers are right, e goes towards 0 and w towards 1; and the less an answer is like the others, as a text that was
said once, the less could chance explain it.

A model that knows too little doubts nobody: all count alike until it gives most answers of a group more than chance
does, as they were asked lately, before it learned from them again. Nor is what most of a group say noise, but news, as
where labels have changed their meaning.

Standard library only.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentd.learn.encoded import LIKELIHOOD, Encoded

_ORDERS = (1, 3, 9)  # tokens before one that its likelihood among the answers is taken from
_REFERENCES = 500  # answers that say how likely others are; more take memory and say the same
_LONGEST = 64  # tokens of an answer; of longer ones none is like the other
_FEWEST = 16  # examples of a group, with fewer of which nothing is said
_RECENT = (16, 256)  # at least and at most so many of a group's last ratios say what its share is; else half of it
_PRIOR = 1.0, 20.0  # said regardless, among so many, before anything is seen
_MOST = 0.6  # of a group, beyond which it is the model that knows too little
_DOUBTED = 0.5  # weight below which an example is
_EVERY = 8  # examples of a group seen between two estimates of its share
_HALVINGS = 24
_FAR = 50.0  # nats, beyond which nothing changes


def surprisals(answers: Sequence[Sequence[int]], vocabulary: int, orders: Sequence[int] = _ORDERS) -> list[float]:
    """-log u of each answer in nats: by an n-gram model of the others, interpolated as Witten and Bell 1991 do.

    So many as `_REFERENCES` of them say it of all; none of them of itself.
    """
    every = -(-len(answers) // _REFERENCES)
    counts: Counter[tuple[int, ...]] = Counter()  # of a context with what follows
    totals: Counter[tuple[int, ...]] = Counter()  # of a context
    kinds: Counter[tuple[int, ...]] = Counter()  # how many different tokens follow it
    for answer in answers[::every]:
        for key in _keys(answer, orders):
            kinds[key[:-1]] += key not in counts
            counts[key] += 1
            totals[key[:-1]] += 1
    out = []
    for i, answer in enumerate(answers):
        own = Counter(_keys(answer, orders) if not i % every else ())
        own_totals, own_kinds = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
        for key, n in own.items():
            own_totals[key[:-1]] += n
            own_kinds[key[:-1]] += n == counts[key]
        surprisal, p = 0.0, 1 / vocabulary
        for key in _keys(answer, orders):
            order = key[0]
            if not order:
                p = 1 / vocabulary
            context = key[:-1]
            seen, different = totals[context] - own_totals[context], kinds[context] - own_kinds[context]
            if seen:
                p = (counts[key] - own[key] + different * p) / (seen + different)
            if order == len(orders):
                surprisal -= math.log(p)
        out.append(surprisal)
    return out


def _keys(answer: Sequence[int], orders: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Of each token, from no context to the longest: (how manieth, context ..., token)."""
    for at, token in enumerate(answer):
        yield 0, token
        for i, order in enumerate(orders, 1):
            yield i, *answer[max(0, at - order) : at], token


@dataclass
class _Group:
    """Examples whose answers are alike, and what was seen of them lately; `share` of them, as it seems, was said
    regardless of the input: 0 while nothing can be said, and where that would be most of them."""

    ratios: deque[float]
    seen: int = 0
    share: float = 0.0

    def note(self, ratio: float) -> None:
        self.ratios.append(ratio)
        self.seen += 1
        if len(self.ratios) == self.ratios.maxlen and not self.seen % _EVERY:
            share = _share(self.ratios)
            news = share > _MOST or _right(statistics.median(self.ratios), share) < _DOUBTED
            self.share = 0.0 if news else share


class LabelNoise:
    """The state of a training in which answers may be wrong.

    examples  of the training, by their numbers; those that were only compared or judged are never doubted
    groups    by number, which belong together: they are wrong equally often. What is not there is never doubted
    like      by the number of an example that judges, the group it would be in, for `spared`
    """

    def __init__(self, examples: dict[int, Encoded], groups: dict[int, int], like: dict[int, int]) -> None:
        self._doubted: set[int] = set()
        self._surprisals: dict[int, float] = {}
        self._of: dict[int, _Group] = {}
        self._groups: list[_Group] = []
        numbers: dict[tuple[int, int], list[int]] = {}
        for number, group in [*groups.items(), *like.items()]:
            encoded = examples[number]
            if encoded.objective == LIKELIHOOD and len(_answer(encoded)) <= _LONGEST:
                numbers.setdefault((group, len(encoded.choices)), []).append(number)
        for (_, choices), members in numbers.items():
            answers = [_answer(examples[number]) for number in members]
            size = sum(number in groups for number in members)
            if size < _FEWEST:
                continue
            vocabulary = choices or 1 + len({token for answer in answers for token in answer})
            low, high = _RECENT
            self._groups.append(_Group(deque(maxlen=max(low, min(high, size // 2)))))
            self._of |= dict.fromkeys(members, self._groups[-1])
            self._surprisals |= zip(members, surprisals(answers, vocabulary, () if choices else _ORDERS), strict=True)

    def weight(self, number: int, log_likelihood: float) -> float:
        """What an example counts in this step, from 0 to 1, where its whole answer has this log-likelihood now."""
        group = self._of.get(number)
        if group is None or not math.isfinite(log_likelihood):  # no step is taken by that, and nothing learned of it
            return 1.0
        ratio = log_likelihood + self._surprisals[number]
        weight = _right(ratio, group.share)
        group.note(ratio)
        (self._doubted.add if weight < _DOUBTED else self._doubted.discard)(number)
        return weight

    def spared(self, number: int, log_likelihood: float) -> float:
        """Nats by which an answer is likelier where some are wrong: log((1 - e) p + e u) - log p, from 0 up but for
        e's own part. An answer that judges is to say what the model knows, not how sure it is that others are wrong."""
        group = self._of.get(number)
        if group is None or not (share := group.share) or not math.isfinite(log_likelihood):
            return 0.0
        doubt = math.log(share / (1 - share)) - log_likelihood - self._surprisals[number]
        return math.log1p(-share) + max(0.0, doubt) + math.log1p(math.exp(-abs(doubt)))

    @property
    def doubted(self) -> list[int]:
        """Numbers of examples that counted less than half when they were seen last."""
        return sorted(self._doubted)

    def as_json(self) -> dict[str, Any]:
        """All that it has seen."""
        groups = [{"seen": group.seen, "share": group.share, "ratios": list(group.ratios)} for group in self._groups]
        return {"groups": groups, "doubted": self.doubted}

    def restore(self, known: dict[str, Any]) -> None:
        """As `as_json` has it."""
        for group, facts in zip(self._groups, known["groups"], strict=True):
            group.seen, group.share = facts["seen"], facts["share"]
            group.ratios.clear()
            group.ratios.extend(facts["ratios"])
        self._doubted = set(known["doubted"])


def _answer(encoded: Encoded) -> list[int]:
    """Its tokens; of a choice its number."""
    return [encoded.correct] if encoded.choices else [token for _, _, token in encoded.target]


def _share(ratios: Sequence[float]) -> float:
    """The likeliest e, for log p - log u of some examples."""
    quotients = [math.exp(max(-_FAR, min(_FAR, ratio))) for ratio in ratios]
    (regardless, among), low, high = _PRIOR, 0.0, 1.0
    for _ in range(_HALVINGS):  # the slope of a concave function
        e = (low + high) / 2
        slope = math.fsum((1 - quotient) / ((1 - e) * quotient + e) for quotient in quotients)
        slope += regardless / e - (among - regardless) / (1 - e)
        low, high = (e, high) if slope > 0 else (low, e)
    return (low + high) / 2


def _right(ratio: float, share: float) -> float:
    """The probability that an answer is right whose log p - log u is `ratio`."""
    return 1 / (1 + share / (1 - share) * math.exp(-max(-_FAR, min(_FAR, ratio))))
