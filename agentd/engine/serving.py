"""Answering requests: slots, prompt reuse, and which tokens are computed together.

The same request must give the same answer whoever else is being served: that is what lets an owner verify a rollback.
Rounding depends on how many tokens of a sequence are computed at once, and llama.cpp's 8-bit activations amplify it to
half a logit. So every slot has a KV cache of its own, prompts are cut at fixed boundaries, and requests whose caller
could tell (greedy or seeded) are decoded by themselves; the others may share batches.

How tokens are computed and sampled is the engine's matter.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from agentd.engine.cuts import Cuts
from agentd.engine.probabilities import Floats, log_probabilities
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import BASE, Generate, Piece, Weights
from agentd.engine.staged import Staged, W
from agentd.engine.text import Detokenizer
from agentd.engine.wire import describe
from agentd.errors import AgentdError, ContextLengthExceeded, InvalidRequest

logger = logging.getLogger(__name__)

W_contra = TypeVar("W_contra", contravariant=True)


class Decoder(Protocol[W_contra]):
    """What computes: `n_seq` sequences, each with a KV cache of its own."""

    @property
    def n_seq(self) -> int: ...

    @property
    def reuses(self) -> bool:
        """Whether a cache can be cut back to a prefix."""

    @property
    def cuts(self) -> Cuts:
        """Where it wants prompts to be cut."""

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[Sequence[int]], wanted: Sequence[int]
    ) -> None:
        """Computes a token in every row, for the sequences named there; `wanted` are the rows whose logits are
        needed."""

    def logits(self, row: int) -> Floats:
        """The logits (n_vocab,) of a wanted row of the last batch."""

    def use(self, staged: W_contra) -> None:
        """Computes with these weights from the next decode on."""

    def forget(self, sequence: int, start: int = 0) -> None:
        """Drops what the cache holds of a sequence, from position `start` on."""


class Sampler(Protocol):
    """Chooses the tokens of one request; `close` frees what it holds."""

    def sample(self, row: int, logits: Floats) -> int:
        """The next token after `row` of the last batch, whose logits (n_vocab,) are given too."""

    def close(self) -> None: ...


@dataclass
class Job(Generic[W]):
    """A request on its way; `number` counts requests."""

    number: int
    request: Generate
    prompt: list[int]
    weights: Weights
    adapters: W
    sampler: Sampler
    text: Detokenizer
    reused: int = 0
    generated: list[int] = field(default_factory=list)


@dataclass
class Slot(Generic[W]):
    """One sequence of the KV cache; `tokens` is what it holds, computed with `adapters`."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    adapters: W | None = None
    job: Job[W] | None = None


class Serving(Generic[W]):
    """`per_slot` is the tokens one request may use, `samplers` makes the sampler of a request or raises
    InvalidRequest."""

    def __init__(
        self,
        context: Decoder[W],
        vocabulary: Prompts,
        per_slot: int,
        staged: Staged[W],
        samplers: Callable[[Generate], Sampler],
    ) -> None:
        self._context, self._vocabulary, self._limit, self._staged = context, vocabulary, per_slot, staged
        self._samplers = samplers
        self._slots: list[Slot[W]] = [Slot(i) for i in range(context.n_seq)]
        self._waiting: deque[Job[W]] = deque()
        self._submitted = 0
        self.weights: Weights = BASE

    # --- adapters

    def uses(self, adapters: W) -> bool:
        """Whether a request is to be answered with these."""
        return any(job.adapters is adapters for job in self._jobs())

    def swap(self, weights: Weights) -> None:
        """New requests get `weights`. No cached prompt survives: it was computed with other adapters."""
        adapters = self._staged[weights]
        self.weights = weights
        for slot in self._slots:
            if slot.job is None:
                self._context.forget(slot.sequence)
                slot.tokens = []
        if not self.busy:
            self._context.use(adapters)

    # --- requests

    def close(self) -> None:
        """Frees what the requests that are still there hold."""
        for job in self._jobs():
            job.sampler.close()

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(slot.job for slot in self._slots)

    def counts(self) -> dict[str, int]:
        return {"active": sum(slot.job is not None for slot in self._slots), "waiting": len(self._waiting)}

    def submit(self, request: Generate) -> None:
        prompt = self._vocabulary.prompt(request.input)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(prompt) >= self._limit:
            raise ContextLengthExceeded(len(prompt), self._limit)
        sampler = self._samplers(request)
        self._submitted += 1
        adapters, text = self._staged[self.weights], Detokenizer(request.stop)
        self._waiting.append(Job(self._submitted, request, prompt, self.weights, adapters, sampler, text))

    def cancel(self, key: str) -> None:
        for job in list(self._waiting):
            if job.request.key == key:
                self._waiting.remove(job)
                job.sampler.close()
        for slot in self._slots:
            if slot.job is not None and slot.job.request.key == key:
                self._release(slot)

    def step(self) -> list[Piece]:
        """One prompt chunk of the oldest unfinished prompt, then one token for everybody who is answering."""
        self._admit()
        pieces: list[Piece] = []
        prompting = [slot for slot in self._slots if slot.job and len(slot.tokens) < len(slot.job.prompt)]
        if prompting:
            pieces += self._guard(self._prompt, [min(prompting, key=lambda slot: slot.job.number if slot.job else 0)])
        together: dict[int, list[Slot[W]]] = {}
        for slot in self._slots:
            if slot.job is None or not slot.job.generated:
                continue
            if slot.job.request.sampling.reproducible:
                pieces += self._guard(self._generate, [slot])
            else:
                together.setdefault(id(slot.job.adapters), []).append(slot)
        for slots in together.values():
            pieces += self._guard(self._generate, slots)
        return pieces

    def _jobs(self) -> list[Job[W]]:
        return [*self._waiting, *(slot.job for slot in self._slots if slot.job)]

    def _admit(self) -> None:
        while self._waiting and any(slot.job is None for slot in self._slots):
            job = self._waiting.popleft()
            free = [slot for slot in self._slots if slot.job is None]
            slot = max(free, key=lambda slot: (self._overlap(slot, job), -len(slot.tokens)))
            job.reused = self._overlap(slot, job)
            self._context.forget(slot.sequence, job.reused)
            slot.tokens, slot.adapters, slot.job = slot.tokens[: job.reused], job.adapters, job

    def _overlap(self, slot: Slot[W], job: Job[W]) -> int:
        if slot.adapters is not job.adapters or not self._context.reuses:
            return 0
        limit = min(len(slot.tokens), len(job.prompt) - 1)
        n = 0
        while n < limit and slot.tokens[n] == job.prompt[n]:
            n += 1
        return self._context.cuts.reusable(n)

    def _guard(self, compute: Callable[[list[Slot[W]]], list[Piece]], slots: list[Slot[W]]) -> list[Piece]:
        """A request that cannot be computed ends with an error; the others go on."""
        try:
            return compute(slots)
        except Exception as error:
            if not isinstance(error, AgentdError):
                logger.exception("a request failed")
            pieces = []
            for slot in slots:
                if slot.job:
                    pieces.append(Piece(slot.job.request.key, revision=int(slot.job.weights), error=describe(error)))
                    self._release(slot)
            return pieces

    def _prompt(self, slots: list[Slot[W]]) -> list[Piece]:
        (slot,) = slots
        job = slot.job
        assert job is not None
        start = len(slot.tokens)
        stop = min(self._context.cuts.after(start), len(job.prompt))
        chunk = job.prompt[start:stop]
        complete = stop == len(job.prompt)
        self._context.use(job.adapters)
        self._context.decode(
            chunk, range(start, stop), [(slot.sequence,)] * len(chunk), [len(chunk) - 1] if complete else []
        )
        slot.tokens = slot.tokens + chunk
        return [self._sample(slot, len(chunk) - 1)] if complete else []

    def _generate(self, slots: list[Slot[W]]) -> list[Piece]:
        jobs = [slot.job for slot in slots if slot.job]
        self._context.use(jobs[0].adapters)
        tokens = [job.generated[-1] for job in jobs]
        self._context.decode(
            tokens, [len(slot.tokens) for slot in slots], [(slot.sequence,) for slot in slots], range(len(slots))
        )
        for slot, token in zip(slots, tokens, strict=True):
            slot.tokens.append(token)
        return [self._sample(slot, row) for row, slot in enumerate(slots)]

    def _sample(self, slot: Slot[W], row: int) -> Piece:
        job = slot.job
        assert job is not None
        logits = self._context.logits(row)
        token = job.sampler.sample(row, logits)
        job.generated.append(token)
        finish, text = None, ""
        logprobs = []
        if self._vocabulary.is_end(token):
            finish, text = "stop", job.text.flush()
        else:
            if job.request.logprobs is not None:
                logprobs = [self._logprob(logits, token, job.request.logprobs)]
            text = job.text.feed(self._vocabulary.piece(token))
            if job.text.stopped:
                finish = "stop"
            elif len(job.generated) >= job.request.max_tokens or len(slot.tokens) + 1 >= self._limit:
                finish, text = "length", text + job.text.flush()
        if finish is not None:
            self._release(slot)
        return Piece(
            key=job.request.key,
            text=text,
            finish=finish,
            revision=int(job.weights),
            prompt_tokens=len(job.prompt),
            cached_tokens=job.reused,
            completion_tokens=len(job.generated),
            logprobs=logprobs,
        )

    def _logprob(self, logits: Floats, token: int, top: int) -> dict[str, Any]:
        values = log_probabilities(logits)
        best: list[int] = values.argpartition(-top)[-top:].tolist() if top else []
        ranked = sorted(best, key=lambda i: -values[i])
        return {**self._entry(token, values), "top_logprobs": [self._entry(i, values) for i in ranked]}

    def _entry(self, token: int, values: Floats) -> dict[str, Any]:
        data = self._vocabulary.piece(token, special=True)
        return {"token": data.decode("utf-8", "replace"), "logprob": float(values[token]), "bytes": list(data)}

    def _release(self, slot: Slot[W]) -> None:
        if slot.job is not None:
            slot.job.sampler.close()
        slot.job = None
        if slot.adapters is not self._staged[self.weights]:  # its cache is of no use to anybody
            self._context.forget(slot.sequence)
            slot.tokens, slot.adapters = [], None
        self._staged.sweep()
