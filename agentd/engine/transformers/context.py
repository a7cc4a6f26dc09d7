"""Serving's sequences: one KV cache each, of which several are computed in one forward where the model allows it.

What must be exact comes by itself (serving.py), and is computed as if there was no one else: prompts in chunks that
end at fixed places, tokens one at a time. The others' next tokens share a forward (joint.py). In bfloat16 rows are
padded at the end, and what the padding left in a cache is cut off.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentd.engine.chunks import ChunkBoundaries
from agentd.engine.prefixes import State
from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Interrupted
from agentd.engine.transformers import cache as caches
from agentd.engine.transformers import few_rows
from agentd.engine.transformers.joint import JointCache, may_join
from agentd.engine.transformers.model import Model, Weights
from agentd.limits import JOINT_ROWS, PRODUCT_ROWS, joint_rows

_TOLERANCE = 0.05  # relative difference of logits that are the same but for rounding
_NOISE, _MOST = 1.5, 0.35  # it may be so many times what the model's own rounding makes of it, and that at most
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


class Context:
    def __init__(self, model: Model, n_seq: int) -> None:
        self._model, self.n_seq = model, n_seq
        self._caches: list[Any] = [None] * n_seq
        self._weights = model.base
        self._logits: dict[int, Floats] = {}
        self.reuses = caches.can_be_cut(caches.slot_cache(model.config))
        self.joins = False  # until it is known that the model computes several sequences at once as each by itself
        # Where a piece is padded to PRODUCT_ROWS rows anyway, one of fewer tokens takes as long.
        self.boundaries = (
            ChunkBoundaries(tuple(PRODUCT_ROWS * n for n in (1, 2, 3, 4))) if model.pads else ChunkBoundaries()
        )

    def use(self, weights: Weights) -> None:
        self._weights = weights

    def warm_up(self, limit: int) -> None:
        """Does what the first request would wait for, and what would count as the memory of a pass before it: weights
        are read from the disk, oneDNN compiles its code, the heap grows. `limit` is the most tokens of a request.
        Whether several sequences may be computed at once is tried out as well."""
        piece = range(min(self.boundaries.after(0), limit - 1))
        self.decode([0] * len(piece), piece, [(0,)] * len(piece), [len(piece) - 1])
        self.decode([0], [len(piece)], [(0,)], [0])
        if self.n_seq > 1 and self.reuses and limit > 4:
            self.joins = self._try_joint(len(piece))
        self.close()
        rows = 2 * JOINT_ROWS
        while self.joins and self._model.pads and rows // 2 < self.n_seq:
            several = min(rows, self.n_seq)
            self.decode([0] * several, [0] * several, [(sequence,) for sequence in range(several)], range(several))
            self.close()
            rows *= 2
        self._logits.clear()

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        logit_rows: Sequence[int],
    ) -> None:
        self._model.install(self._weights)
        self._logits.clear()
        owners = [(s, list(rows)) for s, rows in groupby(range(len(tokens)), key=lambda row: sequences[row][0])]
        if self.joins and len(owners) > 1:
            self._advance_together(owners, tokens, positions, logit_rows)
            return
        for sequence, rows in owners:
            self._advance(sequence, [tokens[row] for row in rows], [row for row in rows if row in logit_rows], rows[0])

    def logits(self, row: int) -> Floats:
        return self._logits[row]

    def hidden(self, tokens: Sequence[int], start: int, sequence: int) -> Floats:
        """See serving.Decoder; what the sequence holds already ends at `start`."""
        self._model.install(self._weights)
        states = self._extend(
            sequence, list(tokens), lambda padded, cache: self._model.hidden(padded, past_key_values=cache)
        )
        return np.asarray(states[: len(tokens)].cpu().numpy(), np.float32)

    def forget(self, sequence: int, start: int = 0) -> None:
        if start == 0:
            self._caches[sequence] = None
        elif self._caches[sequence] is not None:
            caches.cut(self._caches[sequence], start)

    def save(self, sequence: int) -> State:
        return caches.written(self._cache(sequence))

    def load(self, sequence: int, state: State) -> bool:
        try:
            self._caches[sequence] = caches.read(self._model.config, state, self._model.device)
        except (RuntimeError, ValueError, IndexError):
            self._caches[sequence] = None
        return self._caches[sequence] is not None

    @contextlib.contextmanager
    def interruptible(self, interrupted: Callable[[], bool]) -> Iterator[None]:
        def give_way() -> None:
            if interrupted():
                raise Interrupted

        with self._model.giving_way(give_way):
            yield

    def close(self) -> None:
        self._caches = [None] * self.n_seq

    def _cache(self, sequence: int) -> Any:
        if self._caches[sequence] is None:
            self._caches[sequence] = caches.slot_cache(self._model.config)
        return self._caches[sequence]

    def _advance(self, sequence: int, tokens: list[int], logit_rows: list[int], first: int) -> None:
        keep = [row - first for row in logit_rows] or [len(tokens) - 1]
        logits = self._extend(
            sequence,
            tokens,
            lambda padded, cache: self._model.forward(padded, keep, past_key_values=cache, use_cache=True),
        )
        self._logits = dict(zip(logit_rows, logits.cpu().numpy(), strict=False)) | self._logits

    def _advance_together(
        self,
        owners: list[tuple[int, list[int]]],
        tokens: Sequence[int],
        positions: Sequence[int],
        logit_rows: Sequence[int],
    ) -> None:
        padding = joint_rows(len(tokens)) - len(tokens) if self._model.pads else 0
        joint = JointCache(
            [self._cache(sequence) for sequence, _ in owners], [len(rows) for _, rows in owners], self._model.attention
        )
        few = self._model.device.type == "cpu" and not self._model.pads and len(tokens) <= few_rows.MOST
        products = few_rows.turned(self._model.module) if few else contextlib.nullcontext()
        with self._undone([sequence for sequence, _ in owners]), joint.attended(self._model.configs), products:
            logits = self._model.forward(
                [*tokens, *([tokens[-1]] * padding)],
                list(logit_rows) or [len(tokens) - 1],
                multiple=JOINT_ROWS,
                past_key_values=joint,
                position_ids=torch.tensor([[*positions, *([0] * padding)]], device=self._model.device),
                use_cache=True,
            )
            joint.check()
        self._logits = dict(zip(logit_rows, logits.cpu().numpy(), strict=False))

    def _extend(self, sequence: int, tokens: list[int], compute: Callable[[list[int], Any], Tensor]) -> Tensor:
        """What `compute` makes of the next tokens of a sequence, padded, and its cache, which holds them afterwards."""
        cache = self._cache(sequence)
        n = len(tokens)
        pads = self._model.pads and self.reuses and n > 1
        before = cache.get_seq_length() if self.reuses else 0
        padded = [*tokens, *([tokens[-1]] * (-n % PRODUCT_ROWS))] if pads else tokens
        with self._undone([sequence]):
            output = compute(padded, cache)
        if pads:
            caches.cut(cache, before + n)
        return output

    @contextlib.contextmanager
    def _undone(self, sequences: Sequence[int]) -> Iterator[None]:
        """What is given up in the middle leaves caches as they were: some layers are ahead of the others."""
        before = {s: self._caches[s].get_seq_length() if self.reuses else 0 for s in sequences}
        try:
            yield
        except BaseException:
            for sequence, length in before.items():
                self.forget(sequence, length)
            raise

    def _try_joint(self, length: int) -> bool:
        """Compares the logits of two sequences together and each by itself: one holds `length` tokens and gets another,
        the other one holds one and gets three. In bfloat16 a model may say something else of the same three tokens when
        it gets them one by one; together it may differ by no more than that."""
        if not may_join(self._model.module, self._model.config):
            return False
        first, second = 0, 1
        size = self._model.vocabulary.size
        others = [each % size for each in (1, 2, 3, 4)]
        alone = [self._logits[0]]
        self.decode(others, range(4), [(second,)] * 4, [3])
        alone.append(self._logits[3])
        self.forget(second, 1)
        for position in (1, 2, 3):
            self.decode([others[position]], [position], [(second,)], [0])
        room = min(_MOST, max(_TOLERANCE, _NOISE * _difference(self._logits[0], alone[1])))
        self.forget(first, length)
        self.forget(second, 1)
        try:
            owners = [(first, [0]), (second, [1, 2, 3])]
            self._advance_together(owners, [0, *others[1:]], [length, 1, 2, 3], [0, 3])
        except _FAILURES:
            return False
        return all(_difference(self._logits[row], own) <= room for row, own in zip((0, 3), alone, strict=True))


def _difference(logits: Floats, others: Floats) -> float:
    """Relative, of what likelihoods depend on: a number that is added to all logits changes none."""
    a, b = logits - logits.mean(), others - others.mean()
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-9))
