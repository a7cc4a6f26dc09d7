"""An example in tokens, the same for scoring, tapping and training. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LIKELIHOOD, PREFERENCE, UNLIKELIHOOD, METRIC = OBJECTIVES = ("likelihood", "preference", "unlikelihood", "metric")
"""What an example asks for: its target, among its choices if it has some; the first of two answers rather than the
second; anything but its target; that its target is what would be answered, however likely it is."""

Term = tuple[int, int, int]
"""(s, p, token): log p(token | sequence s up to and including position p)."""


@dataclass(frozen=True)
class Encoded:
    """A training or holdout example in tokens, the same for scoring, tapping and training.

    A prompt with many answers is many sequences with the same beginning, which is here once.

    shared     tokens that all sequences begin with; of a single sequence all
    own        what follows in each sequence
    choices    per choice the terms of its log-likelihood; empty for free text. Of a preference there are two, the
               chosen answer and the rejected one, each with its end of turn
    correct    index of the right choice
    target     the terms of the whole right answer, the end of turn included; of an unlikelihood those of the wrong one
    objective  one of OBJECTIVES
    weight     of its loss, above 0
    """

    shared: list[int]
    own: list[list[int]]
    choices: list[list[Term]]
    correct: int
    target: list[Term]
    objective: str = LIKELIHOOD
    weight: float = 1.0

    @classmethod
    def of(
        cls,
        sequences: Sequence[list[int]],
        choices: list[list[Term]],
        correct: int,
        target: list[Term],
        objective: str = LIKELIHOOD,
        weight: float = 1.0,
    ) -> "Encoded":
        """From whole sequences."""
        n = common_prefix(sequences) if len(sequences) > 1 else sum(map(len, sequences))
        shared = list(sequences[0][:n]) if sequences else []
        own = [list(sequence[n:]) for sequence in sequences]
        return cls(shared, own, choices, correct, target, objective, weight)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Encoded":
        """Raises TypeError or ValueError for a tree of another shape."""
        choices = [[(s, p, token) for s, p, token in choice] for choice in tree.pop("choices", [])]
        target = [(s, p, token) for s, p, token in tree.pop("target", [])]
        return cls(**tree, choices=choices, target=target)

    @property
    def sequences(self) -> list[list[int]]:
        """What has to be run through the model, whole; the first tokens are usually shared by all examples."""
        return [self.shared + own for own in self.own]

    @property
    def n_tokens(self) -> int:
        """Of all sequences."""
        return len(self.own) * len(self.shared) + sum(map(len, self.own))

    @property
    def n_distinct(self) -> int:
        """Tokens that are computed where those that all sequences share are computed once."""
        return len(self.shared) + sum(map(len, self.own))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.shared) + max(map(len, self.own), default=0)

    @property
    def terms(self) -> list[Term]:
        """All that is scored, the choices' first."""
        return [term for part in (*self.choices, self.target) for term in part]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning that leaves every sequence at least one token."""
    if not sequences:
        return 0
    low, high = min(map(list, sequences)), max(map(list, sequences))
    limit = min(map(len, sequences)) - 1
    n = 0
    while n < limit and low[n] == high[n]:
        n += 1
    return n


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """Length of what all sequences of all examples begin with, up to the first position that is scored; it leaves every
    sequence at least one token."""
    ends = [example.shared + end(example.own) for example in examples for end in (min, max)]
    shortest = min(len(example.shared) + min(map(len, example.own)) for example in examples)
    first_term = min(position for example in examples for _, position, _ in example.terms)
    return min(common_prefix(ends), shortest - 1, first_term)
