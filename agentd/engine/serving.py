"""Answering requests: slots, prompt reuse, and which tokens are computed together.

A request with a seed gives the same answer whoever else is being served: that is what lets an owner verify a rollback.
Rounding depends on how many tokens of a sequence are computed at once, and llama.cpp's 8-bit activations amplify it to
half a logit. So every slot has a KV cache of its own, and for a request with a seed the prompt is cut at fixed
boundaries, only what was computed so is taken from the cache, and its tokens are decoded by themselves; likewise where
the answer is a choice. The others share batches, take over whatever the cache has, and have their prompts in pieces as
large as others can wait for.

Where an answer must be one of several, it is the likeliest as a whole (choosing.py), as the gate judges it.

How tokens are computed and sampled is the engine's matter.
"""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Generic

from agentd.engine.calls.piece_reader import PieceReader
from agentd.engine.calls.reader import Delta
from agentd.engine.choosing import Choosing
from agentd.engine.chunks import common_length
from agentd.engine.constraints import Compiler, Constraint
from agentd.engine.decoder import Decoder, Sampler
from agentd.engine.jobs import Job, Slot
from agentd.engine.logprobs import logprob
from agentd.engine.pooling import ROWS, MeanPooling
from agentd.engine.probabilities import Floats, log_probabilities
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import BASE, Generate, Interrupted, Piece, Weights
from agentd.engine.recalling import with_recalled
from agentd.engine.text import Detokenizer
from agentd.engine.weight_registry import W, WeightsSource
from agentd.errors import AgentdError, ContextLengthExceeded, InvalidRequest

logger = logging.getLogger(__name__)

_ROWS = 16  # of logits that a choice's tokens take at once: a row is 600 kB where a vocabulary has 150,000 tokens
_SHORT = 128  # tokens of a prompt that are computed at once while others wait for their next token
_NOTHING = Delta()
_WAIT = 0.002  # seconds that a step waits for a constraint, or for its mask


class Serving(Generic[W]):
    """`per_slot` is the tokens one request may use, `samplers` makes the sampler of a request or raises
    InvalidRequest; it gets what constrains the answer besides. `slots`: not every sequence of the context has one."""

    def __init__(
        self,
        context: Decoder[W],
        vocabulary: Prompts,
        per_slot: int,
        registry: WeightsSource[W],
        samplers: Callable[[Generate, Constraint | None], Sampler],
        compiler: Compiler,
        slots: int | None = None,
    ) -> None:
        self._context, self._vocabulary, self._limit, self._registry = context, vocabulary, per_slot, registry
        self._samplers, self._compiler = samplers, compiler
        self._slots: list[Slot[W]] = [Slot(i) for i in range(slots or context.n_seq)]
        self._waiting: deque[Job[W]] = deque()
        self._compiling: list[Job[W]] = []
        self._submitted = 0
        self.weights: Weights = BASE

    # --- adapters

    def uses(self, adapters: W) -> bool:
        """Whether a request is to be answered with these."""
        return any(job.adapters is adapters for job in self._jobs())

    def swap(self, weights: Weights) -> None:
        """New requests get `weights`. No cached prompt survives: it was computed with other adapters."""
        adapters = self._registry[weights]
        self.weights = weights
        for slot in self._slots:
            if slot.job is None:
                self._context.forget(slot.sequence)
                slot.cut(0)
        if not self.busy:
            self._context.use(adapters)

    # --- requests

    def close(self) -> None:
        """Frees what the requests that are still there hold."""
        for job in self._jobs():
            job.close()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._compiling) or any(slot.job for slot in self._slots)

    def counts(self) -> dict[str, int]:
        waiting = len(self._waiting) + len(self._compiling)
        return {"active": sum(slot.job is not None for slot in self._slots), "waiting": waiting}

    def embed(self, key: str, input: dict[str, Any]) -> None:
        job = self._job(Generate(key, input))
        job.pooling = MeanPooling()
        self._waiting.append(job)

    def submit(self, request: Generate) -> None:
        job = self._job(request)
        request = job.request
        if request.choices:
            job.choosing = Choosing.of(request, job.prompt, self._vocabulary, self._limit)
        else:
            plan = self._vocabulary.answer_plan(request.input, job.prompt, request.sampling)
            if plan is not None:
                job.reader = PieceReader(plan.reader(), self._vocabulary.visible)
            if request.sampling.constrained or (plan is not None and plan.use.tools):
                job.compilation = self._compiler.submit(request.sampling, plan)
                self._compiling.append(job)
                return
            job.sampler = self._samplers(request, None)
        self._waiting.append(job)

    def _job(self, request: Generate) -> Job[W]:
        request, prompt, n_recalled = with_recalled(self._vocabulary, request, self._limit)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(prompt) >= self._limit:
            raise ContextLengthExceeded(len(prompt), self._limit)
        self._submitted += 1
        adapters, text = self._registry[self.weights], Detokenizer(request.stop)
        return Job(self._submitted, request, prompt, self.weights, adapters, text, n_recalled)

    def cancel(self, key: str) -> None:
        self._compiling = [job for job in self._compiling if job.request.key != key]
        for job in list(self._waiting):
            if job.request.key == key:
                self._waiting.remove(job)
                job.close()
        for slot in self._slots:
            if slot.job is not None and slot.job.request.key == key:
                self._release(slot)

    def step(self) -> list[Piece]:
        """One prompt chunk of the oldest unfinished prompt, then one token for everybody who is answering."""
        pieces = self._compiled()
        self._admit()
        prompting = [slot for slot in self._slots if slot.job and len(slot.tokens) < len(slot.job.prompt)]
        if prompting:
            pieces += self._guard(self._prompt, [min(prompting, key=lambda slot: slot.job.number if slot.job else 0)])
        together: dict[int, list[Slot[W]]] = {}
        for slot in self._slots:
            if slot.job is None or not slot.job.prompted or not self._masked(slot.job):
                continue
            if slot.job.choosing is not None:
                pieces += self._guard(self._choose, [slot])
            elif self._exact(slot.job):
                pieces += self._guard(self._generate, [slot])
            else:
                together.setdefault(id(slot.job.adapters), []).append(slot)
        for slots in together.values():
            pieces += self._guard(self._generate, slots)
        return pieces

    def _masked(self, job: Job[W]) -> bool:
        """Whether it is known what may follow the token that is decoded next. Where that takes long, the others go on
        meanwhile."""
        return job.constraint is None or job.constraint.ready(_WAIT)

    def _exact(self, job: Job[W]) -> bool:
        """Whether its answer must not depend on who else is served, nor on what the cache holds. A choice never does:
        it is decoded by itself in any case."""
        return job.request.sampling.seed is not None or job.choosing is not None

    def _jobs(self) -> list[Job[W]]:
        return [*self._compiling, *self._waiting, *(slot.job for slot in self._slots if slot.job)]

    def _compiled(self) -> list[Piece]:
        """Lets requests wait for a slot whose constraints are there; those whose are wrong end."""
        if not self._compiling:
            return []
        self._compiler.watch()
        pieces: list[Piece] = []
        for job in list(self._compiling):
            assert job.compilation is not None
            if job.compilation.done.wait(0 if self._waiting or self._active else _WAIT):
                self._compiling.remove(job)
                try:
                    job.constraint = job.compilation.result()
                    job.constraint.prepare()
                    job.sampler = self._samplers(job.request, job.constraint)
                    self._waiting.append(job)
                except AgentdError as error:
                    pieces.append(job.failed(error))
        return pieces

    @property
    def _active(self) -> bool:
        return any(slot.job for slot in self._slots)

    def _admit(self) -> None:
        while self._waiting and any(slot.job is None for slot in self._slots):
            job = self._waiting.popleft()
            free = [slot for slot in self._slots if slot.job is None]
            slot = max(free, key=lambda slot: (self._overlap(slot, job), -len(slot.tokens)))
            job.reused = self._overlap(slot, job)
            self._context.forget(slot.sequence, job.reused)
            slot.cut(job.reused)
            slot.adapters, slot.job = job.adapters, job

    def _overlap(self, slot: Slot[W], job: Job[W]) -> int:
        if slot.adapters is not job.adapters or not self._context.reuses or job.pooling is not None:
            return 0
        common = common_length(slot.tokens, job.prompt[:-1])
        return self._context.boundaries.reusable(min(common, slot.exact)) if self._exact(job) else common

    def _guard(self, compute: Callable[[list[Slot[W]]], list[Piece]], slots: list[Slot[W]]) -> list[Piece]:
        """A request that cannot be computed ends with an error; the others go on. What was given up for something
        more urgent, which leaves the cache as it was, is computed at the next step."""
        try:
            return compute(slots)
        except Interrupted:
            return []
        except Exception as error:
            if not isinstance(error, AgentdError):
                logger.exception("a request failed")
            pieces = []
            for slot in slots:
                if slot.job:
                    pieces.append(slot.job.failed(error))
                    self._release(slot)
            return pieces

    def _prompt(self, slots: list[Slot[W]]) -> list[Piece]:
        (slot,) = slots
        job = slot.job
        assert job is not None
        if job.pooling is not None:
            return self._pool(slot, job, job.pooling)
        start = len(slot.tokens)
        boundary = self._context.boundaries.after(start)
        stop = min(boundary if self._exact(job) else start + self._piece_length(), len(job.prompt))
        chunk = job.prompt[start:stop]
        complete = stop == len(job.prompt)
        self._context.use(job.adapters)
        self._context.decode(
            chunk, range(start, stop), [(slot.sequence,)] * len(chunk), [len(chunk) - 1] if complete else []
        )
        slot.tokens = slot.tokens + chunk
        if start == slot.exact and stop == boundary:
            slot.exact = stop
        if not complete:
            return []
        job.prompted = True
        if job.choosing is not None:
            job.choosing.observe((), self._context.logits(len(chunk) - 1))
            return []
        return [self._sample(slot, len(chunk) - 1)]

    def _piece_length(self) -> int:
        """Tokens of a prompt that are computed at once: the fewer, the sooner the others have their next token."""
        longest = self._context.boundaries.longest
        decoding = any(slot.job and slot.job.prompted for slot in self._slots)
        return min(_SHORT, longest) if decoding else longest

    def _generate(self, slots: list[Slot[W]]) -> list[Piece]:
        jobs = [slot.job for slot in slots if slot.job]
        self._context.use(jobs[0].adapters)
        tokens = [job.generated[-1] for job in jobs]
        self._context.decode(
            tokens, [len(slot.tokens) for slot in slots], [(slot.sequence,) for slot in slots], range(len(slots))
        )
        for slot, token in zip(slots, tokens, strict=True):
            slot.tokens.append(token)
        pieces = []
        for row, slot in enumerate(slots):  # who cannot go on ends alone
            pieces += self._guard(partial(self._sampled, row), [slot])
        return pieces

    def _sampled(self, row: int, slots: list[Slot[W]]) -> list[Piece]:
        return [self._sample(slot, row) for slot in slots]

    def _sample(self, slot: Slot[W], row: int) -> Piece:
        job = slot.job
        assert job is not None
        assert job.sampler is not None
        logits = self._context.logits(row)
        token = job.sampler.sample(row, logits)
        job.generated.append(token)
        finish, text = None, ""
        if job.reader is not None:
            return self._piece(slot, job, *self._read(slot, job, job.reader, token, logits))
        if self._vocabulary.is_end(token):
            finish, text = "stop", job.text.flush()
        else:
            if job.request.logprobs is not None:
                entry = logprob(self._vocabulary, log_probabilities(logits), token, job.request.logprobs)
                job.logprobs.append((job.text.decoded, entry))
            text = job.text.feed(self._vocabulary.piece(token))
            if job.text.stopped:
                finish = "stop"
            elif len(job.generated) >= job.request.max_tokens or len(slot.tokens) + 1 >= self._limit:
                finish, text = "length", text + job.text.flush()
        return self._piece(slot, job, text, finish)

    def _read(
        self, slot: Slot[W], job: Job[W], reader: PieceReader, token: int, logits: Floats
    ) -> tuple[str, str | None, Delta]:
        """(text, finish, reasoning and calls) of a token, where there is more than text in answers."""
        if self._vocabulary.is_end(token):
            delta = reader.flush()
            text = job.text.feed(delta.text.encode())
            return text + job.text.flush(), "tool_calls" if reader.called else "stop", delta
        if job.request.logprobs is not None and reader.speaking:
            entry = logprob(self._vocabulary, log_probabilities(logits), token, job.request.logprobs)
            job.logprobs.append((job.text.decoded, entry))
        delta = reader.feed(token)
        text, finish = job.text.feed(delta.text.encode()), None
        if job.text.stopped:
            finish = "stop"
        elif len(job.generated) >= job.request.max_tokens or len(slot.tokens) + 1 >= self._limit:
            last = reader.flush(cut=True)
            text += job.text.feed(last.text.encode()) + job.text.flush()
            delta = Delta("", delta.reasoning + last.reasoning, delta.calls + last.calls)
            finish = "length"
        return text, finish, delta

    def _piece(self, slot: Slot[W], job: Job[W], text: str, finish: str | None, delta: Delta = _NOTHING) -> Piece:
        """What came out, with the log-probabilities of the tokens whose text did: never of a stop string's."""
        whole = finish is not None and not job.text.stopped and job.reader is None
        sent = [entry for at, entry in job.logprobs if whole or at < job.text.released]
        job.logprobs = job.logprobs[len(sent) :]
        if finish is not None:
            self._release(slot)
        return Piece(
            key=job.request.key,
            text=text,
            reasoning=delta.reasoning,
            calls=delta.calls,
            finish=finish,
            revision=job.revision,
            prompt_tokens=len(job.prompt),
            cached_tokens=job.reused,
            completion_tokens=len(job.generated),
            recalled=job.n_recalled,
            logprobs=sent,
        )

    def _pool(self, slot: Slot[W], job: Job[W], pooling: MeanPooling) -> list[Piece]:
        """The next tokens of what is to be embedded; after the last, its piece."""
        start = len(slot.tokens)
        chunk = job.prompt[start : start + ROWS]
        self._context.use(job.adapters)
        pooling.add(self._context.hidden(chunk, start, slot.sequence))
        slot.tokens = slot.tokens + chunk
        if len(slot.tokens) < len(job.prompt):
            return []
        vector = pooling.vector()
        self._context.forget(slot.sequence)  # no conversation begins with it: its slot is the next one to be taken
        slot.cut(0)
        self._release(slot)
        n, revision = len(job.prompt), job.revision
        return [Piece(job.request.key, finish="stop", embedding=vector, prompt_tokens=n, revision=revision)]

    # --- choices

    def _choose(self, slots: list[Slot[W]]) -> list[Piece]:
        """Computes the likeliest answer whose likelihood is not known yet, or says which one it is."""
        (slot,) = slots
        job = slot.job
        assert job is not None
        assert job.choosing is not None
        answer = job.choosing.search.open()
        if answer is None:
            return [self._chosen(slot, job, job.choosing)]
        self._context.use(job.adapters)
        fed = answer[:-1]  # the last token is predicted, never fed
        n = common_length(slot.tokens[len(job.prompt) :], fed)
        self._rewind(slot, len(job.prompt) + n)
        for start in range(n, len(fed), _ROWS):
            chunk = fed[start : start + _ROWS]
            at = len(slot.tokens)
            rows = range(len(chunk))
            self._context.decode(chunk, range(at, at + len(chunk)), [(slot.sequence,)] * len(chunk), rows)
            slot.tokens = slot.tokens + chunk
            for row in rows:
                job.choosing.observe(tuple(fed[: start + row + 1]), self._context.logits(row))
        return []

    def _rewind(self, slot: Slot[W], n: int) -> None:
        """Cuts a sequence back to its first `n` tokens, or computes those again where its cache cannot be cut."""
        if n == len(slot.tokens):
            return
        tokens = slot.tokens[:n]
        if self._context.reuses:
            self._context.forget(slot.sequence, n)
            slot.cut(n)
            return
        self._context.forget(slot.sequence)
        slot.cut(0)
        while len(slot.tokens) < n:
            start = len(slot.tokens)
            chunk = tokens[start : self._context.boundaries.after(start)]
            self._context.decode(chunk, range(start, start + len(chunk)), [(slot.sequence,)] * len(chunk), [])
            slot.tokens = slot.tokens + chunk

    def _chosen(self, slot: Slot[W], job: Job[W], choosing: Choosing) -> Piece:
        chosen = choosing.chosen()
        job.generated, job.logprobs = chosen.tokens, chosen.logprobs
        said = job.text.feed(chosen.text.encode())
        return self._piece(slot, job, said + job.text.flush(), chosen.finish)

    def _release(self, slot: Slot[W]) -> None:
        if slot.job is not None:
            slot.job.close()
        slot.job = None
        if slot.adapters is not self._registry[self.weights]:  # its cache is of no use to anybody
            self._context.forget(slot.sequence)
            slot.cut(0)
            slot.adapters = None
        self._registry.collect()
