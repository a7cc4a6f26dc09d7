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
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import wait
from functools import partial
from typing import Any, Generic

from agentd.engine.calls.piece_reader import PieceReader
from agentd.engine.calls.reader import Delta
from agentd.engine.choosing import Choosing
from agentd.engine.chunks import common_length
from agentd.engine.constraints import Compiler, Constraint
from agentd.engine.decoder import Decoder, Sampler
from agentd.engine.jobs import Job, Slot
from agentd.engine.pooling import MeanPooling
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import BASE, Generate, Interrupted, Piece, Weights
from agentd.engine.recalling import with_recalled
from agentd.engine.slot_prefixes import SlotPrefixes
from agentd.engine.slot_work import advance, pool
from agentd.engine.text import Detokenizer
from agentd.engine.weight_registry import W, WeightsSource
from agentd.engine.wording import NOTHING, Wording, piece_of
from agentd.errors import AgentdError, ContextLengthExceeded, InvalidRequest

logger = logging.getLogger(__name__)

_STALL = 0.75  # seconds, about, that others wait for their next token while a piece of a prompt is computed
_SHORTEST = 32  # tokens of such a piece: shorter ones take hardly less time
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
        prefixes: SlotPrefixes[W] | None = None,
    ) -> None:
        self._context, self._vocabulary, self._limit, self._registry = context, vocabulary, per_slot, registry
        self._samplers, self._compiler, self._prefixes = samplers, compiler, prefixes
        self._slots: list[Slot[W]] = [Slot(i) for i in range(slots or context.n_seq)]
        self._prompt_rate = 256.0  # tokens per second, until it is known
        self._waiting: deque[Job[W]] = deque()
        self._preparing: list[Job[W]] = []
        self._submitted = 0
        self._wording = Wording(vocabulary)
        self.weights: Weights = BASE

    def uses(self, adapters: W) -> bool:
        """Whether a request is to be answered with these."""
        return any(job.adapters is adapters for job in self._jobs())

    def swap(self, weights: Weights) -> None:
        """New requests get `weights`. What was computed with others is dropped, if it is not kept beyond the slots."""
        adapters = self._registry[weights]
        self.weights = weights
        for slot in self._slots:
            if slot.job is None and slot.adapters is not adapters:
                self._context.forget(slot.sequence)
                slot.cut(0)
        if not self.busy:
            self._context.use(adapters)

    def warming(self, weights: Weights, interrupted: Callable[[], bool]) -> Generator[None, None, int]:
        """Computes with `weights`, before they are swapped in, the prefixes that are used most; returns the tokens.
        Yields where requests may come in between. Raises RevisionCorrupt where they are not staged, or not any more."""
        if self._prefixes is None or weights == self.weights:
            return 0
        old, new, computed = self._registry[self.weights], self._registry[weights], 0
        for n in self._prefixes.warming(self._slots, old, new, interrupted):
            computed += n
            yield
            if self._registry[self.weights] is not old or self._registry[weights] is not new:
                break  # it was not waited for; the new ones may even be freed
        return computed

    def tend(self) -> bool:
        """Keeps what one more slot holds that no one uses; false where there is none."""
        slot = next((slot for slot in self._slots if slot.job is None and not slot.kept), None)
        if slot is None or self._prefixes is None:
            return False
        slot.kept = True
        self._prefixes.keep(slot)
        return True

    def forget(self, before: float | None) -> None:
        """Drops what is kept of prompts, see PrefixStore.forget, and what slots hold, or will when they are free."""
        if self._prefixes is not None:
            self._prefixes.store.forget(before)
        for slot in (slot for slot in self._slots if before is None or slot.began < before):
            slot.private = True
            if slot.job is None:
                self._context.forget(slot.sequence)
                slot.cut(0)

    def close(self) -> None:
        """Frees what the requests that are still there hold."""
        for job in self._jobs():
            job.close()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._preparing) or any(slot.job for slot in self._slots)

    def counts(self) -> dict[str, int]:
        waiting = len(self._waiting) + len(self._preparing)
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
            else:
                job.sampler = self._samplers(request, None)
        if self._prefixes is not None:
            there = max((self._overlap(slot, job) for slot in self._slots), default=0)
            self._prefixes.fetch(job, self._exact(job), there)
        (self._preparing if job.compilation or job.fetch else self._waiting).append(job)

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
        for jobs in (self._preparing, self._waiting):
            for job in [job for job in jobs if job.request.key == key]:
                jobs.remove(job)
                job.close()
        for slot in self._slots:
            if slot.job is not None and slot.job.request.key == key:
                self._release(slot)

    def step(self) -> list[Piece]:
        """One piece of the oldest unfinished prompts, then one token for everybody who is answering."""
        pieces = self._compiled()
        self._admit()
        if prompting := self._prompting():
            pieces += self._guard(self._prompt, prompting)
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

    def _prompting(self) -> list[Slot[W]]:
        """Whose prompts are computed next: the oldest one's, and with it others' that may share its batch."""
        slots = [slot for slot in self._slots if slot.job and len(slot.tokens) < len(slot.job.prompt)]
        jobs = sorted((slot.job.number, slot, slot.job) for slot in slots if slot.job)
        if not jobs:
            return []
        _, first, oldest = jobs[0]
        if self._exact(oldest) or oldest.pooling is not None:
            return [first]
        return [
            slot
            for _, slot, job in jobs
            if job.adapters is oldest.adapters and job.pooling is None and not self._exact(job)
        ]

    def _exact(self, job: Job[W]) -> bool:
        """Whether its answer must not depend on who else is served, nor on what the cache holds. A choice never does:
        it is decoded by itself in any case."""
        return job.request.sampling.seed is not None or job.choosing is not None

    def _jobs(self) -> list[Job[W]]:
        return [*self._preparing, *self._waiting, *(slot.job for slot in self._slots if slot.job)]

    def _compiled(self) -> list[Piece]:
        """Lets requests wait for a slot whose constraints, and what was read of their prompts, are there; those whose
        constraints are wrong end."""
        if not self._preparing:
            return []
        self._compiler.watch()
        pieces: list[Piece] = []
        for job in list(self._preparing):
            seconds = 0 if self._waiting or self._active else _WAIT
            if job.fetch is not None and not wait([job.fetch], seconds).done:
                continue
            if job.compilation is not None and not job.compilation.done.wait(seconds):
                continue
            self._preparing.remove(job)
            try:
                if job.compilation is not None:
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
            if self._prefixes is not None and job.pooling is None:
                there = self._overlap(slot, job)
                slot = self._prefixes.restore(free, job, self._exact(job), there) or slot
                if len(slot.tokens) > there:
                    self._prefixes.keep(slot)
            job.reused = self._overlap(slot, job)
            self._context.forget(slot.sequence, job.reused)
            slot.cut(job.reused)
            slot.begin(job)

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
        """The next tokens of prompts, as many in all as others can wait for. One that must be exact, or is to be
        embedded, comes by itself."""
        jobs = [slot.job for slot in slots if slot.job]
        if jobs[0].pooling is not None:
            return self._embed(slots[0], jobs[0], jobs[0].pooling)
        room = self._piece_length()
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[tuple[int]] = []
        ends: list[tuple[Slot[W], Job[W], int, int | None]] = []  # its stop, and the row of a whole prompt's last token
        for slot, job in zip(slots, jobs, strict=True):
            start = len(slot.tokens)
            stop = min(self._context.boundaries.after(start) if self._exact(job) else start + room, len(job.prompt))
            if stop == start:
                break
            tokens += job.prompt[start:stop]
            positions += range(start, stop)
            sequences += [(slot.sequence,)] * (stop - start)
            room -= stop - start
            ends.append((slot, job, stop, len(tokens) - 1 if stop == len(job.prompt) else None))
        self._context.use(jobs[0].adapters)
        began = time.perf_counter()
        self._context.decode(tokens, positions, sequences, [row for *_, row in ends if row is not None])
        self._noted(len(tokens), time.perf_counter() - began)
        pieces = []
        for slot, job, stop, row in ends:
            start = len(slot.tokens)
            slot.tokens = job.prompt[:stop]
            if len(ends) == 1 and start == slot.exact and stop == self._context.boundaries.after(start):
                slot.exact = stop  # what shared a batch with others' may differ in its last bits
            if row is not None:
                pieces += self._guard(partial(self._prompted, row), [slot])
        return pieces

    def _prompted(self, row: int, slots: list[Slot[W]]) -> list[Piece]:
        """What follows a prompt that is computed whole, the last token in `row`."""
        (slot,) = slots
        job = slot.job
        assert job is not None
        job.prompted = True
        if job.choosing is not None:
            job.choosing.observe((), self._context.logits(row))
            return []
        return [self._sample(slot, row)]

    def _piece_length(self) -> int:
        """Tokens of a prompt that are computed at once: the fewer, the sooner the others have their next token, and the
        more often they wait."""
        longest = self._context.boundaries.longest
        if not any(slot.job and slot.job.prompted for slot in self._slots):
            return longest
        return min(longest, max(_SHORTEST, int(self._prompt_rate * _STALL) // _SHORTEST * _SHORTEST))

    def _noted(self, tokens: int, seconds: float) -> None:
        """How fast prompts are computed just now; short pieces say little of that."""
        if tokens >= _SHORTEST:
            self._prompt_rate += 0.3 * (tokens / max(seconds, 1e-6) - self._prompt_rate)

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
        logits = partial(self._context.logits, row)  # a view of them costs as much as the rest of what is done here
        token = job.sampler.sample(row, logits)
        job.generated.append(token)
        full = len(slot.tokens) + 1 >= self._limit
        return self._said(slot, job, *self._wording.of_token(job, token, logits, full=full))

    def _said(self, slot: Slot[W], job: Job[W], text: str, finish: str | None, delta: Delta = NOTHING) -> Piece:
        if finish is not None:
            self._release(slot)
        return piece_of(job, text, finish, delta)

    def _choose(self, slots: list[Slot[W]]) -> list[Piece]:
        """Computes the likeliest answer whose likelihood is not known yet, or says which one it is."""
        (slot,) = slots
        job = slot.job
        assert job is not None
        assert job.choosing is not None
        answer = job.choosing.search.open()
        if answer is not None:
            advance(self._context, slot, job, job.choosing, answer)
            return []
        chosen = job.choosing.chosen()
        job.generated, job.logprobs = chosen.tokens, chosen.logprobs
        said = job.text.feed(chosen.text.encode())
        return [self._said(slot, job, said + job.text.flush(), chosen.finish)]

    def _embed(self, slot: Slot[W], job: Job[W], pooling: MeanPooling) -> list[Piece]:
        """The next tokens of what is to be embedded; after the last, its piece."""
        piece = pool(self._context, slot, job, pooling)
        if piece is None:
            return []
        self._release(slot)
        return [piece]

    def _release(self, slot: Slot[W]) -> None:
        if slot.job is not None:
            slot.job.close()
        slot.job = None
        if slot.adapters is not self._registry[self.weights]:  # its cache is of no use to anybody
            self._context.forget(slot.sequence)
            slot.cut(0)
            slot.adapters = None
        self._registry.collect()
