"""Many sequences through a unified KV cache at once: shared beginnings are computed once."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agentd.engine.llamacpp.context import Context
from agentd.engine.probabilities import Floats, log_probabilities
from agentd.engine.protocol import Interrupted, Scores
from agentd.errors import InvalidRequest
from agentd.learn.encoded import METRIC, Encoded, Term, shared_prefix
from agentd.limits import scored_rows

_PREFIX = 0  # the sequence id that holds what all examples begin with


@dataclass(frozen=True)
class MicroBatch:
    """Some examples laid out as one batch; `rows[e][s]` are the batch rows of a sequence's tokens after the prefix.

    An example of more answers than there are sequences has them in groups that take turns: `turns` are the first rows
    of all groups but the first, each with the position up to which its sequences are kept.

    `scored` has the tokens whose likelihoods are wanted, by the row that predicts them;
    `greedy` are the rows of which the likeliest token is wanted, too. Once the batch has been decoded,
    `log_likelihoods` has log p by (row, token), and `likeliest` that token.
    """

    tokens: list[int]
    positions: list[int]
    owners: list[list[int]]
    rows: list[list[list[int]]]
    examples: list[Encoded]
    turns: dict[int, int] = field(default_factory=dict)
    scored: dict[int, set[int]] = field(default_factory=dict)
    greedy: set[int] = field(default_factory=set)
    log_likelihoods: dict[tuple[int, int], float] = field(default_factory=dict)
    likeliest: dict[int, int] = field(default_factory=dict)


Read = Callable[[MicroBatch, int, Floats], None]
"""Takes a micro-batch, one of its scored rows, and the row's logits (n_vocab,): a view that does not last."""


class Forward:
    """Runs examples in micro-batches of at most `width` tokens, small enough to repeat after an interruption.

    An example longer than that is decoded in parts, of which an interruption repeats only one.
    """

    def __init__(self, context: Context, width: int) -> None:
        self._context, self._width = context, min(width, context.width)
        self.prefix: list[int] = []
        self._scored_rows = scored_rows(context.n_vocab)
        self.n_sequences = context.n_seq - 1  # that one micro-batch may have at a time

    def reset(self) -> None:
        """Drops what was computed with other adapters."""
        self._context.forget()
        self.prefix = []

    def run(self, examples: Sequence[Encoded], scoring: bool = True) -> Iterator[MicroBatch | None]:
        """Yields each micro-batch when it has been decoded, and None after every interruption.

        With `scoring`, the log-likelihoods of all terms are found; otherwise no logits are computed.
        """
        return self._run(examples, _find if scoring else None)

    def scores(self, batch: MicroBatch) -> list[Scores]:
        """Log-likelihoods of a micro-batch that was run with its terms wanted."""

        def values(e: int, terms: Sequence[Term]) -> list[float]:
            return [batch.log_likelihoods[self._row(batch.rows[e], term), term[2]] for term in terms]

        def likeliest(e: int, terms: Sequence[Term]) -> list[bool]:
            return [batch.likeliest[self._row(batch.rows[e], term)] == term[2] for term in terms]

        return [
            Scores(
                [sum(values(e, choice)) for choice in example.choices],
                values(e, example.target),
                likeliest(e, example.target) if example.objective == METRIC else [],
            )
            for e, example in enumerate(batch.examples)
        ]

    def _row(self, rows: Sequence[Sequence[int]], term: Term) -> int:
        """The row of a micro-batch that predicts a term of the example that has these rows."""
        s, p, _ = term
        return rows[s][p - len(self.prefix)]

    def distributions(self, example: Encoded, read: Callable[[int, Floats], None]) -> Iterator[None]:
        """Gives `read` the log-probabilities (n_vocab,) at each scored row, numbered. Yields after interruptions."""
        count = itertools.count()
        for batch in self._run([example], lambda _, __, logits: read(next(count), log_probabilities(logits))):
            if batch is None:
                yield

    def _run(self, examples: Sequence[Encoded], read: Read | None) -> Iterator[MicroBatch | None]:
        if not examples:
            return
        yield from self._hold_prefix(examples)
        start = 0
        while start < len(examples):
            batch = self._layout(examples, start)
            for sequence in _sequences(batch):
                self._context.forget(sequence, 0)  # a run that was abandoned may have left something
                if self.prefix:
                    self._context.share(_PREFIX, sequence)
            yield from self._decode(batch, read)
            yield batch
            for sequence in _sequences(batch):
                self._context.forget(sequence, 0)
            start += len(batch.examples)

    def _decode(self, batch: MicroBatch, read: Read | None) -> Iterator[None]:
        """Computes a micro-batch. What an interruption hits is repeated; parts before it stay in the cache."""
        score_rows = sorted(batch.scored) if read else []
        done = 0
        while done < len(batch.tokens):
            if done in batch.turns:  # what the group before had of its own makes room; what all share stays
                for sequence in _sequences(batch):
                    self._context.forget(sequence, batch.turns[done])
            turn = min((row for row in batch.turns if row > done), default=len(batch.tokens))
            end = min(done + self._width, turn)
            if read is None and self._context.recurrent:
                # llama.cpp puts what belongs to different sequences into another order, which a tap would have.
                owners = batch.owners[done]
                end = next((row for row in range(done, end) if batch.owners[row] != owners), end)
            scored = [row for row in score_rows if done <= row < end]
            if len(scored) > self._scored_rows:
                end, scored = scored[self._scored_rows], scored[: self._scored_rows]
            part = slice(done, end)
            try:
                self._context.decode(
                    batch.tokens[part], batch.positions[part], batch.owners[part], [row - done for row in scored]
                )
            except Interrupted:
                yield None
                continue
            if read:
                for row in scored:
                    read(batch, row, self._context.logits(row - done))
            done = end

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
                len(batch.tokens) + example.n_distinct - len(self.prefix) > width
                or sequence + min(len(example.own), self.n_sequences) > self._context.n_seq
            ):
                break
            rows = self._place(batch, example, sequence)
            for term in example.terms:
                batch.scored.setdefault(self._row(rows, term), set()).add(term[2])
            if example.objective == METRIC:
                batch.greedy.update(self._row(rows, term) for term in example.target)
            batch.rows.append(rows)
            batch.examples.append(example)
            sequence += min(len(example.own), self.n_sequences)
        return batch

    def _place(self, batch: MicroBatch, example: Encoded, sequence: int) -> list[list[int]]:
        """Adds an example; tokens that several of its sequences begin with are computed once, for all of them."""
        begin = len(self.prefix)
        n, shared = min(len(example.own), self.n_sequences), len(example.shared)
        if len(example.own) > n and self._context.recurrent:
            reason = f"of this model no more than {n} answers that part before their last token can be compared"
            raise InvalidRequest(reason)
        first = len(batch.tokens)
        batch.tokens.extend(example.shared[begin:])
        batch.positions.extend(range(begin, shared))
        batch.owners.extend([list(range(sequence, sequence + n)) for _ in range(begin, shared)])
        together = list(range(first, len(batch.tokens)))
        rows = []
        for i, own in enumerate(example.own):
            at = len(batch.tokens)
            if i and i % n == 0:
                batch.turns[at] = shared
            batch.tokens.extend(own)
            batch.positions.extend(range(shared, shared + len(own)))
            batch.owners.extend([[sequence + i % n] for _ in own])
            rows.append(together + list(range(at, len(batch.tokens))))
        return rows


def _sequences(batch: MicroBatch) -> set[int]:
    return {owner for owners in batch.owners for owner in owners}


def _find(batch: MicroBatch, row: int, logits: Floats) -> None:
    log_p = log_probabilities(logits)
    for token in batch.scored[row]:
        batch.log_likelihoods[row, token] = float(log_p[token])
    if row in batch.greedy:
        batch.likeliest[row] = int(log_p.argmax())
