"""Many sequences through a unified KV cache at once: shared beginnings are computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentd.engine.encode import common_prefix, n_distinct, shared_prefix
from agentd.engine.llamacpp.context import Context
from agentd.engine.probabilities import Floats, log_probabilities
from agentd.engine.protocol import Encoded, Interrupted, Scores, Term

_PREFIX = 0  # the sequence id that holds what all examples begin with


@dataclass(frozen=True)
class MicroBatch:
    """Some examples laid out as one batch; `rows[e][s]` are the batch rows of a sequence's tokens after the prefix."""

    tokens: list[int]
    positions: list[int]
    owners: list[list[int]]
    rows: list[list[list[int]]]
    examples: list[Encoded]


class Forward:
    """Runs examples in micro-batches of at most `width` tokens, small enough to repeat after an interruption."""

    def __init__(self, context: Context, width: int) -> None:
        self._context, self._width = context, min(width, context.width)
        self.prefix: list[int] = []
        self.n_sequences = context.n_seq - 1  # that one micro-batch may have

    def reset(self) -> None:
        """Drops what was computed with other adapters."""
        self._context.forget()
        self.prefix = []

    def run(self, examples: Sequence[Encoded], wanted: bool = True) -> Iterator[MicroBatch | None]:
        """Yields each micro-batch when it has been decoded, and None after every interruption.

        With `wanted`, logits are there for every term of the examples; otherwise for none.
        """
        if not examples:
            return
        yield from self._hold_prefix(examples)
        start = 0
        while start < len(examples):
            batch = self._layout(examples, start)
            rows = sorted({row for row in self._wanted(batch) if row is not None}) if wanted else []
            for sequence in {owner for owners in batch.owners for owner in owners}:
                if self.prefix:
                    self._context.share(_PREFIX, sequence)
            try:
                self._context.decode(batch.tokens, batch.positions, batch.owners, rows)
            except Interrupted:
                self._drop(batch)
                yield None
                continue
            yield batch
            self._drop(batch)
            start += len(batch.examples)

    def scores(self, batch: MicroBatch) -> list[Scores]:
        """Log-likelihoods of a micro-batch that was run with its logits."""
        cache: dict[int, Floats] = {}

        def terms(e: int, wanted: Sequence[Term]) -> list[float]:
            values = []
            for s, p, token in wanted:
                row = batch.rows[e][s][p - len(self.prefix)]
                if row not in cache:
                    cache[row] = log_probabilities(self._context.logits(row))
                values.append(float(cache[row][token]))
            return values

        return [
            Scores([sum(terms(e, choice)) for choice in example.choices], terms(e, example.target))
            for e, example in enumerate(batch.examples)
        ]

    def distributions(self, batch: MicroBatch) -> Iterator[Floats]:
        """The log-probabilities (n_vocab,) at every wanted row, in order."""
        for row in sorted(self._wanted(batch)):
            yield log_probabilities(self._context.logits(row))

    def _hold_prefix(self, examples: Sequence[Encoded]) -> Iterator[None]:
        """Computes what all examples begin with, unless the cache holds just that.

        A shorter prefix left by other examples would serve as well, but then results would depend on the history:
        rounding follows how the tokens are laid out.
        """
        n = shared_prefix(examples)
        prefix = examples[0].sequences[0][:n]
        if prefix == self.prefix:
            return
        self.reset()
        done = 0
        while done < n:
            part = prefix[done : done + self._width]
            try:
                self._context.decode(part, range(done, done + len(part)), [(_PREFIX,)] * len(part), [])
                done += len(part)
            except Interrupted:
                yield None
        self.prefix = prefix

    def _layout(self, examples: Sequence[Encoded], start: int) -> MicroBatch:
        batch = MicroBatch([], [], [], [], [])
        width = min(self._width, self._context.n_ctx - len(self.prefix))
        sequence = _PREFIX + 1
        for example in examples[start:]:
            if batch.examples and (
                len(batch.tokens) + n_distinct(example.sequences) - len(self.prefix) > width
                or sequence + len(example.sequences) > self._context.n_seq
            ):
                break
            batch.rows.append(self._place(batch, example, sequence))
            batch.examples.append(example)
            sequence += len(example.sequences)
        return batch

    def _place(self, batch: MicroBatch, example: Encoded, sequence: int) -> list[list[int]]:
        """Adds an example; tokens that several of its sequences begin with are computed once, for all of them."""
        begin = len(self.prefix)
        n = len(example.sequences)
        shared = common_prefix(example.sequences) if n > 1 else len(example.sequences[0])
        first = len(batch.tokens)
        for position in range(begin, shared):
            batch.tokens.append(example.sequences[0][position])
            batch.positions.append(position)
            batch.owners.append(list(range(sequence, sequence + n)))
        together = list(range(first, len(batch.tokens)))
        rows = []
        for i, tokens in enumerate(example.sequences):
            own = []
            for position in range(max(begin, shared), len(tokens)):
                own.append(len(batch.tokens))
                batch.tokens.append(tokens[position])
                batch.positions.append(position)
                batch.owners.append([sequence + i])
            rows.append(together + own)
        return rows

    def _wanted(self, batch: MicroBatch) -> set[int]:
        begin = len(self.prefix)
        return {
            batch.rows[e][s][p - begin]
            for e, example in enumerate(batch.examples)
            for terms in (*example.choices, example.target)
            for s, p, _ in terms
        }

    def _drop(self, batch: MicroBatch) -> None:
        for sequence in {owner for owners in batch.owners for owner in owners}:
            self._context.forget(sequence, 0)
