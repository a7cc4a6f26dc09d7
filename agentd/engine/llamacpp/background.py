"""Background work over the serving weights: encode, score, tap, perturb. Serving may interrupt every forward pass."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentd.engine.encode import encode, n_distinct
from agentd.engine.llamacpp.adapters import Adapters, write_control_vector
from agentd.engine.llamacpp.context import Context, anonymous_mappings, release_zero_pages
from agentd.engine.llamacpp.forward import Forward
from agentd.engine.llamacpp.tap import Tap
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.probabilities import Floats, kl_divergence
from agentd.engine.protocol import BASE, Encoded, Scores, TapIndex, Weights
from agentd.engine.staged import Staged
from agentd.errors import InvalidRequest
from agentd.learn.objectives import objective
from agentd.learn.rng import rademacher

# Large enough to keep the matrix kernels busy, small enough that repeating one after an interruption costs little.
MICRO_BATCH = 128
_N_SEQ = 64


class Background:
    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        staged: Staged[Adapters],
        *,
        n_ctx: int,
        threads: int,
        interrupted: Callable[[], bool],
        closed: Callable[["Background"], None],
    ) -> None:
        self._vocabulary, self._staged, self._closed = vocabulary, staged, closed
        self._tap = Tap()
        mappings = anonymous_mappings()
        self._context = Context(
            model,
            n_ctx=n_ctx,
            n_seq=_N_SEQ,
            width=max(MICRO_BATCH, min(512, n_ctx)),
            threads=threads,
            streams=False,
            flash=True,
            on_tensor=self._tap.callback,
        )
        release_zero_pages(mappings)
        self._context.abort_when(interrupted)
        self._context.after_decode = self._tap.settle
        self._forward = Forward(self._context, MICRO_BATCH)
        self._weights, self._adapters = BASE, staged[BASE]
        # The control vector as it stands after updates, and the one the context computes with; None is all zero.
        self._control: Floats | None = None
        self._steered: Floats | None = None
        self.limit = min(n_ctx, self._context.width)

    def encode(self, input: dict[str, Any], choices: Sequence[str], target: str) -> Encoded:
        prompt = self._vocabulary.prompt(input)
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        if choices and target not in choices:
            raise InvalidRequest(f"the answer {target!r} is not one of the choices")
        answers = {text: self._vocabulary.answer(input, prompt, text) for text in (*choices, target)}
        encoded = encode(prompt, [answers[choice] for choice in choices], answers[target], self._vocabulary.end)
        if (n := n_distinct(encoded.sequences)) > self.limit:
            raise InvalidRequest(f"{n} tokens are more than the {self.limit} of a background batch")
        if len(encoded.sequences) > self._forward.n_sequences:
            raise InvalidRequest(
                f"{len(encoded.sequences)} different answers are more than the {self._forward.n_sequences} "
                f"of a background batch"
            )
        return encoded

    def use(self, weights: Weights) -> None:
        adapters = self._staged[weights]
        self._context.use(adapters)
        self._weights, self._adapters = weights, adapters
        self._control = self._steered = adapters.control
        self._forward.reset()
        self._staged.sweep()

    def uses(self, adapters: Adapters) -> bool:
        return self._adapters is adapters

    def score(self, examples: Sequence[Encoded]) -> Iterator[list[Scores]]:
        self._steer(self._control)
        for batch in self._forward.run(examples):
            yield [] if batch is None else self._forward.scores(batch)

    def tap(self, examples: Sequence[Encoded], blocks: range, path: Path) -> Iterator[int | TapIndex]:
        if not blocks or blocks[0] < 0 or blocks[-1] >= self._context.n_layer:
            raise InvalidRequest(f"there are no blocks {blocks} in a model of {self._context.n_layer}")
        self._steer(self._control)
        self._forward.reset()  # the prefix is wanted too, so it must be computed under the tap
        self._tap.watch(blocks)
        n_embd = self._context.n_embd
        index: list[list[tuple[int, int]]] = []
        row = rows = n_prefix = 0
        try:
            with path.open("wb") as file:
                for batch in self._forward.run(examples, wanted=False):
                    if batch is None:
                        yield len(index)
                        continue
                    n_prefix = len(self._forward.prefix)
                    if not index:
                        row = n_prefix
                        rows = n_prefix + sum(len(s) - n_prefix for e in examples for s in e.sequences)
                    first = row
                    for nested in batch.rows:
                        placed = []
                        for own in nested:
                            placed.append((row, len(own)))
                            row += len(own)
                        index.append(placed)
                    for plane, block in enumerate(blocks):
                        if first == n_prefix:
                            file.seek(4 * n_embd * rows * plane)
                            file.write(self._tap.rows(block, n_prefix, n_embd, skip_last=len(batch.tokens)).tobytes())
                        hidden = self._tap.rows(block, len(batch.tokens), n_embd)
                        file.seek(4 * n_embd * (rows * plane + first))
                        for own in (own for nested in batch.rows for own in nested):
                            file.write(hidden[own].tobytes())
                    self._tap.clear()
                    yield len(index)
        finally:
            self._tap.watch(range(0))
            self._forward.reset()  # nothing was computed above the last tapped block
        yield TapIndex(n_embd, n_prefix, rows, index)

    def loss(self, examples: Sequence[Encoded], nll_weight: float, seed: int, scale: float) -> Iterator[float | None]:
        if not examples:
            raise InvalidRequest("a loss needs examples")
        self._steer(self._moved(seed, scale) if scale else self._control)
        losses: list[float] = []
        for batch in self._forward.run(examples):
            if batch is not None:
                losses += [
                    objective([[c] for c in s.choices], e.correct, s.target, nll_weight).loss
                    for s, e in zip(self._forward.scores(batch), batch.examples, strict=True)
                ]
            yield None
        yield float(np.mean(losses))

    def update(self, seed: int, coefficient: float) -> None:
        self._control = self._moved(seed, coefficient)

    def write_control(self, path: Path) -> None:
        write_control_vector(path, self._control_or_zero())

    def _steer(self, control: Floats | None) -> None:
        """Computes with this control vector; what the cache holds was computed with another one."""
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
        total, n = 0.0, 0
        before = self._weights
        for text in texts:
            tokens = self._vocabulary.tokenize(text, begin=True)[:MICRO_BATCH]
            if len(tokens) < 2:
                continue
            terms = [(0, p, tokens[p + 1]) for p in range(len(tokens) - 1)]
            example = Encoded([tokens[:-1]], [], 0, terms)
            kept: list[Floats] = []
            self.use(reference)
            for batch in self._forward.run([example]):
                if batch is not None:
                    kept = list(self._forward.distributions(batch))
                yield None
            self.use(candidate)
            for batch in self._forward.run([example]):
                if batch is not None:
                    for p, q in zip(kept, self._forward.distributions(batch), strict=True):
                        total, n = total + kl_divergence(p, q), n + 1
                yield None
        self.use(before)
        if not n:
            raise InvalidRequest("drift needs texts of at least two tokens")
        yield total / n if np.isfinite(total) else float("inf")

    def close(self) -> None:
        self._context.close()
        self._closed(self)
