"""Serving's sequences: one KV cache each, and one forward for one sequence at a time.

Every sequence is computed by itself, so an answer cannot depend on company. Prompts come in chunks, which end at fixed
places where exactness is asked for (serving.py); in bfloat16 a chunk is padded at its end, and what the padding left in
the cache is cut off.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from agentd.engine.chunks import ChunkBoundaries
from agentd.engine.probabilities import Floats
from agentd.engine.transformers import cache as caches
from agentd.engine.transformers.model import Model, Weights
from agentd.limits import PRODUCT_ROWS


class Context:
    def __init__(self, model: Model, n_seq: int) -> None:
        self._model, self.n_seq = model, n_seq
        self._caches: list[Any] = [None] * n_seq
        self._weights = model.base
        self._logits: dict[int, Floats] = {}
        self.reuses = caches.can_be_cut(caches.slot_cache(model.config))
        # Where a piece is padded to PRODUCT_ROWS rows anyway, one of fewer tokens takes as long.
        self.boundaries = (
            ChunkBoundaries(tuple(PRODUCT_ROWS * n for n in (1, 2, 3, 4))) if model.pads else ChunkBoundaries()
        )

    def use(self, weights: Weights) -> None:
        self._weights = weights

    def warm_up(self, limit: int) -> None:
        """Does what the first request would wait for, and what would count as the memory of a pass before it: weights
        are read from the disk, oneDNN compiles its code, the heap grows. `limit` is the most tokens of a request."""
        piece = range(min(self.boundaries.after(0), limit - 1))
        self.decode([0] * len(piece), piece, [(0,)] * len(piece), [len(piece) - 1])
        self.decode([0], [len(piece)], [(0,)], [0])
        self.forget(0)
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
        for sequence, group in groupby(range(len(tokens)), key=lambda row: sequences[row][0]):
            rows = list(group)
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

    def close(self) -> None:
        self._caches = [None] * self.n_seq

    def _advance(self, sequence: int, tokens: list[int], logit_rows: list[int], first: int) -> None:
        keep = [row - first for row in logit_rows] or [len(tokens) - 1]
        logits = self._extend(
            sequence,
            tokens,
            lambda padded, cache: self._model.forward(padded, keep, past_key_values=cache, use_cache=True),
        )
        for row, values in zip(logit_rows, logits.cpu().numpy(), strict=False):
            self._logits[row] = values

    def _extend(self, sequence: int, tokens: list[int], compute: Callable[[list[int], Any], Tensor]) -> Tensor:
        """What `compute` makes of the next tokens of a sequence, padded, and its cache, which holds them afterwards."""
        cache = self._caches[sequence]
        if cache is None:
            cache = self._caches[sequence] = caches.slot_cache(self._model.config)
        n = len(tokens)
        pads = self._model.pads and self.reuses and n > 1
        before = cache.get_seq_length() if self.reuses else 0
        padded = [*tokens, *([tokens[-1]] * (-n % PRODUCT_ROWS))] if pads else tokens
        try:
            output = compute(padded, cache)
        except BaseException:
            if before:
                caches.cut(cache, before)  # some of its layers are ahead of the others
            else:
                self._caches[sequence] = None
            raise
        if pads:
            caches.cut(cache, before + n)
        return output
