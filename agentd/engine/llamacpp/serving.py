"""Answering requests: slots, prompt reuse, and which tokens are computed together.

The same request must give the same answer whoever else is being served: that is what lets an owner verify a rollback.
llama.cpp's rounding depends on how many tokens of a sequence are computed at once, and 8-bit activations amplify it
to half a logit. So every slot has a KV stream of its own, prompts are cut at fixed boundaries, and requests whose
caller could tell (greedy or seeded) are decoded by themselves; the others share batches.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from agentd.engine.llamacpp.context import Adapters, Context, Floats
from agentd.engine.llamacpp.sampling import JSON_GRAMMAR, Sampler, choices_grammar, log_probabilities
from agentd.engine.llamacpp.text import Detokenizer
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.protocol import BASE, Generate, Piece, Weights
from agentd.errors import AgentdError, ContextLengthExceeded, InvalidRequest

CHUNK = 256
_BOUNDARIES = (32, 64, 96, 128, 192, 256)  # where prompts are cut; beyond, every CHUNK tokens


def next_boundary(position: int) -> int:
    """The first cut after `position`."""
    return next((b for b in _BOUNDARIES if b > position), (position // CHUNK + 1) * CHUNK)


def reusable(n: int) -> int:
    """How many of `n` equal leading tokens may be taken from the cache: up to the last cut."""
    if n >= _BOUNDARIES[-1]:
        return n // CHUNK * CHUNK
    return max((b for b in _BOUNDARIES if b <= n), default=0)


@dataclass
class Job:
    """A request on its way."""

    request: Generate
    prompt: list[int]
    weights: Weights
    sampler: Sampler
    text: Detokenizer
    reused: int = 0
    generated: list[int] = field(default_factory=list)


@dataclass
class Slot:
    """One sequence of the KV cache; `tokens` is what it holds, computed with `weights`."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    weights: Weights = BASE
    job: Job | None = None


class Serving:
    def __init__(self, context: Context, vocabulary: Vocabulary, per_slot: int) -> None:
        self._context, self._vocabulary, self._limit = context, vocabulary, per_slot
        self._slots = [Slot(i) for i in range(context.n_seq)]
        self._waiting: deque[Job] = deque()
        self._adapters: dict[Weights, Adapters] = {BASE: Adapters()}
        self.weights: Weights = BASE

    # --- adapters

    def stage(self, weights: Weights, adapters: Adapters) -> None:
        self._adapters[weights] = adapters

    def in_use(self, weights: Weights) -> bool:
        return weights == self.weights or any(job.weights == weights for job in self._jobs())

    def adapters(self, weights: Weights) -> Adapters:
        return self._adapters[weights]

    def unstage(self, weights: Weights) -> Adapters | None:
        return self._adapters.pop(weights, None)

    @property
    def staged(self) -> list[Weights]:
        return list(self._adapters)

    def swap(self, weights: Weights) -> None:
        """New requests get `weights`. No cached prompt survives: it was computed with other adapters."""
        self.weights = weights
        for slot in self._slots:
            if slot.job is None:
                self._context.forget(slot.sequence)
                slot.tokens = []

    # --- requests

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
        sampling = request.sampling
        grammar = choices_grammar(request.choices) if request.choices else sampling.grammar
        if grammar == "json":
            grammar = JSON_GRAMMAR
        sampler = Sampler(self._vocabulary.pointer, self._vocabulary.size, sampling, grammar)
        self._waiting.append(Job(request, prompt, self.weights, sampler, Detokenizer(request.stop)))

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
            pieces += self._guard(self._prompt, [prompting[0]])
        together: dict[Weights, list[Slot]] = {}
        for slot in self._slots:
            if slot.job is None or not slot.job.generated:
                continue
            if slot.job.request.sampling.reproducible:
                pieces += self._guard(self._generate, [slot])
            else:
                together.setdefault(slot.job.weights, []).append(slot)
        for slots in together.values():
            pieces += self._guard(self._generate, slots)
        return pieces

    def _jobs(self) -> list[Job]:
        return [*self._waiting, *(slot.job for slot in self._slots if slot.job)]

    def _admit(self) -> None:
        while self._waiting and any(slot.job is None for slot in self._slots):
            job = self._waiting.popleft()
            free = [slot for slot in self._slots if slot.job is None]
            slot = max(free, key=lambda slot: (self._overlap(slot, job), -len(slot.tokens)))
            job.reused = self._overlap(slot, job)
            self._context.forget(slot.sequence, job.reused)
            slot.tokens, slot.weights, slot.job = slot.tokens[: job.reused], job.weights, job

    def _overlap(self, slot: Slot, job: Job) -> int:
        if slot.weights != job.weights:
            return 0
        limit = min(len(slot.tokens), len(job.prompt) - 1)
        n = 0
        while n < limit and slot.tokens[n] == job.prompt[n]:
            n += 1
        return reusable(n)

    def _guard(self, compute: Any, slots: list[Slot]) -> list[Piece]:
        """A request that cannot be computed ends with an error; the others go on."""
        try:
            pieces: list[Piece] = compute(slots)
            return pieces
        except AgentdError as error:
            pieces = []
            for slot in slots:
                if slot.job:
                    detail = {"message": str(error), "type": error.type, "code": error.code, "status": error.status}
                    pieces.append(Piece(slot.job.request.key, error=detail))
                    self._release(slot)
            return pieces

    def _prompt(self, slots: list[Slot]) -> list[Piece]:
        (slot,) = slots
        job = slot.job
        assert job is not None
        start = len(slot.tokens)
        stop = min(next_boundary(start), len(job.prompt))
        chunk = job.prompt[start:stop]
        complete = stop == len(job.prompt)
        self._context.use(self._adapters[job.weights])
        self._context.decode(
            chunk, range(start, stop), [(slot.sequence,)] * len(chunk), [len(chunk) - 1] if complete else []
        )
        slot.tokens = slot.tokens + chunk
        return [self._sample(slot, len(chunk) - 1)] if complete else []

    def _generate(self, slots: list[Slot]) -> list[Piece]:
        jobs = [slot.job for slot in slots if slot.job]
        self._context.use(self._adapters[jobs[0].weights])
        tokens = [job.generated[-1] for job in jobs]
        self._context.decode(
            tokens, [len(slot.tokens) for slot in slots], [(slot.sequence,) for slot in slots], range(len(slots))
        )
        for slot, token in zip(slots, tokens, strict=True):
            slot.tokens.append(token)
        return [self._sample(slot, row) for row, slot in enumerate(slots)]

    def _sample(self, slot: Slot, row: int) -> Piece:
        job = slot.job
        assert job is not None
        logits = self._context.logits(row)
        token = job.sampler.sample(self._context.pointer, row, logits)
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

    def _release(self, slot: Slot) -> None:
        if slot.job is not None:
            slot.job.sampler.close()
        slot.job = None
        if slot.weights != self.weights:  # its cache is of no use to anybody
            self._context.forget(slot.sequence)
            slot.tokens = []
