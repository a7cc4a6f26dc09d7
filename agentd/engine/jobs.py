"""A request on its way through serving, and the slot of the cache in which it is answered."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic

from agentd.engine.calls.piece_reader import PieceReader
from agentd.engine.choosing import Choosing
from agentd.engine.constraints import Compilation, Constraint
from agentd.engine.decoder import Sampler
from agentd.engine.pooling import MeanPooling
from agentd.engine.process.wire import describe
from agentd.engine.protocol import Generate, Piece, Weights
from agentd.engine.text import Detokenizer
from agentd.engine.weight_registry import W


@dataclass
class Job(Generic[W]):
    """A request on its way; `number` counts requests, `n_recalled` the corrections in its prompt."""

    number: int
    request: Generate
    prompt: list[int]
    weights: Weights
    adapters: W
    text: Detokenizer
    n_recalled: int = 0
    sampler: Sampler | None = None  # None while its constraint is compiled, and where it chooses
    compilation: Compilation | None = None
    constraint: Constraint | None = None  # on the answer, once it is compiled
    choosing: Choosing | None = None
    pooling: MeanPooling | None = None  # where it is to be embedded
    reader: PieceReader | None = None  # where there is more than text in answers
    fetch: "Future[Any] | None" = None  # what its prompt begins with, on its way from a file
    prompted: bool = False  # the whole prompt is computed
    reused: int = 0
    generated: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # with places in the text, to be sent

    @property
    def revision(self) -> int:
        """Whose answer it is; a candidate is none yet."""
        return int(self.weights) if self.weights.isdecimal() else 0

    def failed(self, error: Exception) -> Piece:
        return Piece(self.request.key, revision=self.revision, error=describe(error))

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()


@dataclass
class Slot(Generic[W]):
    """One sequence of the KV cache; `tokens` is what it holds, computed with `adapters`, the first `exact` of them in
    the pieces that end at the fixed boundaries (chunks.py)."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    exact: int = 0
    adapters: W | None = None
    job: Job[W] | None = None
    private: bool = False  # its request is not recorded, so nothing of it is kept
    kept: bool = False  # what it holds was kept, or is not worth it
    began: float = 0.0  # seconds since the epoch

    def begin(self, job: Job[W]) -> None:
        self.adapters, self.job, self.private = job.adapters, job, job.request.private
        self.kept, self.began = False, time.time()

    def cut(self, n: int) -> None:
        """What it holds are its first `n` tokens alone."""
        self.tokens, self.exact = self.tokens[:n], min(self.exact, n)
