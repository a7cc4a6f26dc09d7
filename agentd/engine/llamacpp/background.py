"""Background work over the serving weights: encode, score, tap, perturb. Serving may interrupt every forward pass."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentd.engine.answering import answered
from agentd.engine.chunks import ChunkBoundaries
from agentd.engine.constraints import Compiler, Constraint
from agentd.engine.encode import encode_example
from agentd.engine.llamacpp.adapters import Adapters
from agentd.engine.llamacpp.context import Context, anonymous_mappings, is_recurrent, release_zero_pages
from agentd.engine.llamacpp.forward import Forward
from agentd.engine.llamacpp.sampling import TokenSampler
from agentd.engine.llamacpp.shared_serving import SharedServing
from agentd.engine.llamacpp.tap import TapRecorder
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.probabilities import Floats, kl_divergence
from agentd.engine.protocol import BASE, Generate, Piece, Scores, TapIndex, Target, Weights
from agentd.engine.serving import Serving
from agentd.engine.weight_registry import Single, WeightRegistry
from agentd.errors import AgentdError, InvalidRequest
from agentd.formats import adapter_gguf
from agentd.host import allocator
from agentd.host.openmp import Spinning
from agentd.learn.encoded import Encoded, common_prefix
from agentd.learn.objectives import example_objective
from agentd.learn.philox import rademacher
from agentd.limits import DRIFT_ROWS, MICRO_BATCH, RECURRENT_SEQUENCES

# Large enough to keep the matrix kernels busy, small enough that repeating one after an interruption costs little.
_N_SEQ = 64
_AT_ONCE = 8  # answered: what is done between two of their batches takes no more than a few milliseconds
_CELLS = 256  # llama.cpp's step for the size of a cache


class LlamaCppBackground:
    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        registry: WeightRegistry[Adapters],
        compiler: Compiler,
        *,
        n_ctx: int,
        threads: int,
        spinning: Spinning,
        interrupted: Callable[[], bool],
        closed: Callable[["LlamaCppBackground"], None],
    ) -> None:
        self._model, self.vocabulary, self._registry, self._compiler = model, vocabulary, registry, compiler
        self._threads, self._interrupted, self._closed = threads, interrupted, closed
        self._spinning = spinning
        self._tap = TapRecorder()
        self._weights, self._adapters = BASE, registry[BASE]
        # The control vector as it stands after updates, and the one the context computes with; None is all zero.
        self._control: Floats | None = None
        self._steered: Floats | None = None
        self.limit = n_ctx
        self._over = False
        self._open(0)

    def _open(self, longest: int) -> None:
        """A context for examples of up to `longest` tokens: every cell of its cache takes memory, used or not, at least
        for the moment in which llama.cpp zeroes them all."""
        cells = -(-(longest + MICRO_BATCH) // _CELLS) * _CELLS
        mappings = anonymous_mappings()
        self._context = Context(
            self._model,
            n_ctx=min(cells, self.limit),
            n_seq=RECURRENT_SEQUENCES if is_recurrent(self._model) else _N_SEQ,
            width=MICRO_BATCH,
            threads=self._threads,
            streams=False,
            flash=True,
            on_tensor=self._tap.callback,
            spinning=self._spinning,
        )
        release_zero_pages(mappings)
        self._context.abort_when(self._interrupted)
        self._context.boundaries = ChunkBoundaries(tuple(cut for cut in ChunkBoundaries().at if cut <= MICRO_BATCH))
        self._context.after_decode = self._tap.settle
        self._forward = Forward(self._context, MICRO_BATCH)
        self._foreign = False  # the cache holds what is not `_forward`'s
        self._longest = longest

    def _fit(self) -> None:
        """Sees to it that the context has room for what was encoded."""
        if self._longest + MICRO_BATCH > self._context.n_ctx < self.limit:
            self._context.close()
            self._reopen()

    def _reopen(self) -> None:
        self._open(self._longest)
        self._context.use(self._adapters)
        self._steered = self._adapters.control

    def encode(self, input: dict[str, Any], choices: Sequence[str], target: Target, **more: Any) -> Encoded:
        encoded = encode_example(self.vocabulary, input, choices, target, limit=self.limit, **more)
        self._longest = max(self._longest, encoded.n_distinct)
        return encoded

    def use(self, weights: Weights) -> None:
        self._fit()
        adapters = self._registry[weights]
        self._context.use(adapters)
        self._weights, self._adapters = weights, adapters
        self._control = self._steered = adapters.control
        self._forward.reset()
        self._registry.collect()

    def uses(self, adapters: Adapters) -> bool:
        return self._adapters is adapters

    def score(self, examples: Sequence[Encoded]) -> Iterator[list[Scores]]:
        self._steer(self._control)
        for batch in self._forward.run(examples):
            yield [] if batch is None else self._forward.scores(batch)

    def answer(
        self, requests: Sequence[Generate], enough: Callable[[Piece], bool]
    ) -> Generator[list[Piece], None, None]:
        """See the protocol."""
        choices = [request for request in requests if request.choices]
        others = [request for request in requests if not request.choices]
        if others:
            yield from self._speak(others, enough)
        if choices:
            yield from self._choose(choices, enough)

    def _choose(
        self, requests: Sequence[Generate], enough: Callable[[Piece], bool]
    ) -> Generator[list[Piece], None, None]:
        """To the last bit as serving does: its code, in a context like its own. Who shares a batch or a cache, and how
        attention is computed, moves an answer's log-likelihood by half a nat; the session's own context makes room."""
        longest = 0
        for request in requests:
            with contextlib.suppress(AgentdError):  # it is refused once more, when it is submitted
                prompt = self.vocabulary.prompt(request.input)
                answers = (self.vocabulary.answer(request.input, prompt, choice) for choice in request.choices)
                longest = max(longest, len(prompt) + max(map(len, answers)) + 1)
            yield []
        self._context.close()
        try:
            context = self._context = Context(  # its own, so that it is closed whoever ends the session
                self._model,
                n_ctx=min(-(-longest // _CELLS) * _CELLS or _CELLS, self.limit),
                n_seq=1,
                width=ChunkBoundaries().longest,
                threads=self._threads,
                streams=True,
            )
            context.abort_when(self._interrupted)
            weights = Single(Adapters(self._adapters.lora, self._control))
            serving = Serving(context, self.vocabulary, context.n_ctx, weights, self._sampler, self._compiler)
            yield from answered(serving, requests, serving.step, enough)
        finally:
            self._context.close()
            if not self._over:  # the session may end first
                self._reopen()

    def _sampler(self, request: Generate, constraint: Constraint | None) -> TokenSampler:
        return TokenSampler(self._context.pointer, self.vocabulary.size, request.sampling, constraint)

    def _speak(
        self, requests: Sequence[Generate], enough: Callable[[Piece], bool]
    ) -> Generator[list[Piece], None, None]:
        """What all prompts begin with is computed once; several are answered at a time, as far as the context has room
        for them."""
        prompts: dict[str, list[int]] = {}
        for request in requests:
            with contextlib.suppress(AgentdError):  # it is refused once more, when it is submitted
                prompts[request.key] = self.vocabulary.prompt(request.input)
            yield []
        self._longest = max([self._longest, *(min(len(prompt), self.limit) for prompt in prompts.values())])
        self._steer(self._control)
        prefix = next(iter(prompts.values()), [])[: common_prefix(list(prompts.values()))]
        self._foreign = True
        self._context.forget()

        serving = SharedServing(
            self._context,
            self.vocabulary,
            Adapters(self._adapters.lora, self._control),
            self._sampler,
            self._compiler,
            prefix,
            _AT_ONCE,
        )
        for _ in serving.hold():
            yield []
        yield from answered(
            serving,
            requests,
            serving.step,
            enough,
            at_once=_AT_ONCE,
            room=self._context.n_ctx - len(prefix),
            needs=lambda request: len(prompts.get(request.key, prefix)) - len(prefix) + request.max_tokens,
        )

    def tap(self, examples: Sequence[Encoded], blocks: range, path: Path) -> Iterator[int | TapIndex]:
        if not blocks or blocks[0] < 0 or blocks[-1] >= self._context.n_layer:
            raise InvalidRequest(f"there are no blocks {blocks} in a model of {self._context.n_layer}")
        self._steer(self._control)
        self._forward.reset()  # the prefix is wanted too, so it must be computed under the tap
        self._tap.watch(blocks)
        n_embd = self._context.n_embd
        starts: list[int] = []
        row = rows = n_prefix = 0
        try:
            with path.open("wb") as file:
                for batch in self._forward.run(examples, scoring=False):
                    if batch is None:
                        yield len(starts)
                        continue
                    n_prefix = len(self._forward.prefix)
                    if not starts:
                        row = n_prefix
                        rows = n_prefix + sum(e.n_distinct - n_prefix for e in examples)
                    first = row
                    for example in batch.examples:  # a micro-batch has the rows of its examples in this order
                        starts.append(row)
                        row += example.n_distinct - n_prefix
                    for plane, block in enumerate(blocks):
                        if first == n_prefix:
                            file.seek(4 * n_embd * rows * plane)
                            file.write(self._tap.rows(block, n_prefix, n_embd, skip_last=len(batch.tokens)).tobytes())
                        hidden = self._tap.rows(block, len(batch.tokens), n_embd)
                        file.seek(4 * n_embd * (rows * plane + first))
                        file.write(hidden.tobytes())
                    self._tap.clear()
                    yield len(starts)
        finally:
            self._tap.watch(range(0))
            self._forward.reset()  # nothing was computed above the last tapped block
        yield TapIndex(n_embd, n_prefix, rows, starts)

    def loss(self, examples: Sequence[Encoded], nll_weight: float, seed: int, scale: float) -> Iterator[float | None]:
        if not examples:
            raise InvalidRequest("a loss needs examples")
        self._steer(self._moved(seed, scale) if scale else self._control)
        losses: list[float] = []
        for batch in self._forward.run(examples):
            if batch is not None:
                losses += [
                    example_objective(e, s.choices, s.target, nll_weight, s.likeliest).loss
                    for s, e in zip(self._forward.scores(batch), batch.examples, strict=True)
                ]
            yield None
        yield float(np.mean(losses))

    def update(self, seed: int, coefficient: float) -> None:
        self._control = self._moved(seed, coefficient)

    def write_control(self, path: Path) -> None:
        adapter_gguf.write_control(path, self._control_or_zero())

    def _steer(self, control: Floats | None) -> None:
        """Computes with this control vector; what the cache holds was computed with another one."""
        self._fit()
        if self._foreign:
            self._forward.reset()
            self._foreign = False
        if control is not self._steered:
            self._context.steer(control)
            self._steered = control
            self._forward.reset()

    def _moved(self, seed: int, coefficient: float) -> Floats:
        """The control vector + coefficient · z(seed), in float32, so that a replay gives the same bits."""
        control = self._control_or_zero()
        # A block of signs per layer, so that any layer's can be made alone.
        z = np.stack([rademacher(seed, layer + 1, self._context.n_embd) for layer in range(len(control))])
        return control + np.float32(coefficient) * z

    def _control_or_zero(self) -> Floats:
        if self._control is not None:
            return self._control
        return np.zeros((self._context.n_layer - 1, self._context.n_embd), dtype=np.float32)

    def drift(self, texts: Sequence[str], reference: Weights, candidate: Weights) -> Iterator[float | None]:
        before = self._weights
        sequences = [self.vocabulary.tokenize(text, begin=True)[: DRIFT_ROWS + 1] for text in texts]
        sequences = [tokens for tokens in sequences if len(tokens) > 1]
        # One array for all of it: many of this size, made and dropped in turn, would leave the heap full of holes.
        reference_log_p = np.empty((max(map(len, sequences), default=1) - 1, self._context.n_vocab), np.float32)
        divergences: list[float] = []

        def keep(i: int, log_p: Floats) -> None:
            reference_log_p[i] = log_p

        def compare(i: int, log_q: Floats) -> None:
            divergences.append(kl_divergence(reference_log_p[i], log_q))

        for tokens in sequences:
            example = Encoded.of([tokens[:-1]], [], 0, [(0, p, token) for p, token in enumerate(tokens[1:])])
            self.use(reference)
            yield from self._forward.distributions(example, keep)
            self.use(candidate)
            yield from self._forward.distributions(example, compare)
        self.use(before)
        if not divergences:
            raise InvalidRequest("drift needs texts of at least two tokens")
        mean = float(np.mean(divergences))
        yield mean if np.isfinite(mean) else float("inf")

    def close(self) -> None:
        self._over = True
        self._context.close()
        allocator.trim()
        self._closed(self)
