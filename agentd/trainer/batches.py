"""Micro-batches: examples with all their answers, laid out for one forward pass.

What answers share is computed once. All examples of a micro-batch stand in one row, in which each token sees its own
text and its own answer (nn/tree_mask.py). A model that does not obey such a mask gets a row for every answer, padded on
the right.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from agentd.learn.encoded import Encoded, Term
from agentd.nn.tree_mask import Tree


@dataclass(frozen=True)
class Example:
    """`number` is the engine's."""

    number: int
    encoded: Encoded
    dev: bool = False

    @property
    def terms(self) -> list[Term]:
        return self.encoded.terms


@dataclass(frozen=True)
class Layout:
    """Where rows are in a tap file: those of the prefix that all examples share are the first.

    starts  by its number an example's first row: what its answers share behind the prefix, then each answer's own
    """

    prefix: int
    starts: Mapping[int, int]

    @classmethod
    def in_order(cls, examples: Sequence[Example], prefix: int) -> "Layout":
        """One example after the other."""
        starts, at = {}, prefix
        for example in examples:
            starts[example.number] = at
            at += example.encoded.n_distinct - prefix
        return cls(prefix, starts)


@dataclass(frozen=True)
class Span:
    """`n` rows of a tap file, those of the prefix where `example` is None, and where they stand in a forward pass."""

    example: Example | None
    offset: int
    n: int
    sequence: int
    position: int


@dataclass(frozen=True)
class Batch:
    """`together`: in one row of tokens, along a tree; else a row for each sequence."""

    examples: list[Example]
    prefix: int
    together: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens) of the forward pass, padding included."""
        if self.together:
            return 1, self.prefix + sum(e.encoded.n_distinct - self.prefix for e in self.examples)
        return sum(len(e.encoded.own) for e in self.examples), max(e.encoded.longest for e in self.examples)

    @cached_property
    def tree(self) -> Tree | None:
        if not self.together:
            return None
        parts = [(len(e.encoded.shared) - self.prefix, [len(own) for own in e.encoded.own]) for e in self.examples]
        return Tree.of(self.prefix, parts)

    def pieces(self) -> Iterator[Span]:
        prefix, sequence = self.prefix, 0
        if self.together:
            yield Span(None, 0, prefix, 0, 0)
            at = prefix
            for example in self.examples:
                n = example.encoded.n_distinct - prefix
                yield Span(example, 0, n, 0, at)
                at += n
            return
        for example in self.examples:
            shared = len(example.encoded.shared)
            offset = shared - prefix
            for own in example.encoded.own:
                yield Span(None, 0, prefix, sequence, 0)
                yield Span(example, 0, shared - prefix, sequence, prefix)
                yield Span(example, offset, len(own), sequence, shared)
                offset += len(own)
                sequence += 1

    @cached_property
    def rows(self) -> list[int]:
        """Per term of every example the row that it is scored at, in the flattened (rows x tokens)."""
        indices, at, sequence = [], self.prefix, 0
        for example in self.examples:
            encoded, shared = example.encoded, len(example.encoded.shared)
            own = [sum(map(len, encoded.own[:s])) for s in range(len(encoded.own))] if self.together else []
            for s, position, _ in encoded.terms:
                if not self.together:
                    indices.append((sequence + s) * self.shape[1] + position)
                elif position < self.prefix:
                    indices.append(position)
                else:
                    indices.append(at + position - self.prefix + (own[s] if position >= shared else 0))
            at += encoded.n_distinct - self.prefix
            sequence += len(encoded.own)
        return indices


def batches(examples: Sequence[Example], prefix: int, tokens: int, together: bool) -> list[Batch]:
    """Micro-batches of similar length, each of at most `tokens` tokens with padding and prefix (or one example)."""
    out: list[Batch] = []
    for example in sorted(examples, key=lambda example: example.encoded.longest):
        if out:
            grown = Batch([*out[-1].examples, example], prefix, together)
            rows, width = grown.shape
            if rows * width <= tokens:
                out[-1] = grown
                continue
        out.append(Batch([example], prefix, together))
    return out
