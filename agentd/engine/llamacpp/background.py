"""Background work over the serving weights: encode, score, tap, perturb. Serving may interrupt every forward pass."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lc
import numpy as np

from agentd.engine.encode import encode
from agentd.engine.llamacpp.context import Adapters, Context, Floats
from agentd.engine.llamacpp.forward import Forward, kl_divergence
from agentd.engine.llamacpp.library import ggml, last_words
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.protocol import Encoded, Scores, TapIndex, Weights
from agentd.errors import EngineUnavailable, InvalidRequest
from agentd.learn.objectives import objective
from agentd.learn.rng import rademacher

# Large enough to keep the matrix kernels busy, small enough that repeating one after an interruption costs little.
MICRO_BATCH = 192
_N_SEQ = 64


class Background:
    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        adapters: Callable[[Weights], Adapters],
        *,
        n_ctx: int,
        threads: int,
        interrupted: Callable[[], bool],
    ) -> None:
        self._model, self._vocabulary, self._adapters = model, vocabulary, adapters
        self._tap = _Tap()
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
        self._context.abort_when(interrupted)
        self._context.after_decode = self._tap.settle
        self._forward = Forward(self._context, MICRO_BATCH)
        self._control = np.zeros((self._context.n_layer - 1, self._context.n_embd), dtype=np.float32)
        self.limit = min(n_ctx, self._context.width)

    def encode(self, input: dict[str, Any], choices: Sequence[str], target: str) -> Encoded:
        prompt = self._vocabulary.prompt(input)
        answers = {text: self._vocabulary.answer(input, prompt, text) for text in (*choices, target)}
        encoded = encode(prompt, [answers[choice] for choice in choices], answers[target], self._vocabulary.end)
        if encoded.n_tokens > self.limit:
            raise InvalidRequest(f"{encoded.n_tokens} tokens are more than the {self.limit} of a background batch")
        return encoded

    def use(self, weights: Weights) -> None:
        adapters = self._adapters(weights)
        self._context.use(adapters)
        self._control = np.zeros_like(self._control) if adapters.control is None else adapters.control.copy()
        self._forward.reset()

    def score(self, examples: Sequence[Encoded]) -> Iterator[list[Scores]]:
        for batch in self._forward.run(examples):
            yield [] if batch is None else self._forward.scores(batch)

    def tap(self, examples: Sequence[Encoded], block: int, path: Path) -> Iterator[int | TapIndex]:
        self._forward.reset()  # the prefix is wanted too, so it must be computed under the tap
        self._tap.watch(block)
        n_embd = self._context.n_embd
        index: list[list[tuple[int, int]]] = []
        row = 0
        try:
            with path.open("wb") as file:
                for batch in self._forward.run(examples, wanted=False):
                    if batch is None:
                        yield len(index)
                        continue
                    n_prefix = len(self._forward.prefix)
                    if not index and n_prefix:
                        file.write(self._tap.rows(n_prefix, n_embd, skip_last=len(batch.tokens)).tobytes())
                        row = n_prefix
                    hidden = self._tap.rows(len(batch.tokens), n_embd)
                    for rows in batch.rows:
                        placed = []
                        for own in rows:
                            file.write(hidden[own].tobytes())
                            placed.append((row, len(own)))
                            row += len(own)
                        index.append(placed)
                    self._tap.clear()
                    yield len(index)
        finally:
            self._tap.watch(None)
        yield TapIndex(n_embd, len(self._forward.prefix), index)

    def loss(self, examples: Sequence[Encoded], nll_weight: float, seed: int, scale: float) -> Iterator[float | None]:
        self._context.steer(self._control + np.float32(scale) * self._direction(seed) if scale else self._control)
        self._forward.reset()
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
        self._control = self._control + np.float32(coefficient) * self._direction(seed)

    def _direction(self, seed: int) -> Floats:
        """z(seed): a block of signs per layer, so that any layer's can be made alone."""
        return np.stack([rademacher(seed, layer + 1, self._context.n_embd) for layer in range(len(self._control))])

    def write_control(self, path: Path) -> None:
        write_control_vector(path, self._control)

    def drift(self, texts: Sequence[str], reference: Weights, candidate: Weights) -> Iterator[float | None]:
        total, n = 0.0, 0
        for text in texts:
            tokens = self._vocabulary.tokenize(text, begin=True)[: MICRO_BATCH - 1]
            terms = [(0, p, tokens[p + 1]) for p in range(len(tokens) - 1)]
            example = Encoded([tokens[:-1]], [], 0, terms)
            kept: list[list[Floats]] = []
            for weights in (reference, candidate):
                self.use(weights)
                for batch in self._forward.run([example]):
                    if batch is None:
                        yield None
                    else:
                        kept.append([row.copy() for row in self._forward.distributions(batch)])
            for p, q in zip(*kept, strict=True):
                total, n = total + kl_divergence(p, q), n + 1
            yield None
        yield total / n if np.isfinite(total) else float("inf")

    def close(self) -> None:
        self._context.close()


class _Tap:
    """Collects the input of one block during normal decodes, through llama.cpp's evaluation callback."""

    def __init__(self) -> None:
        self._names: frozenset[bytes] = frozenset()
        self._parts: list[Floats] = []
        self._pending: list[Floats] = []  # of the decode that is running
        library = ggml()

        def on_tensor(tensor: int, ask: bool, user_data: Any) -> bool:
            if not self._names or library.ggml_get_name(tensor) not in self._names:
                return not ask
            if not ask:
                part = np.empty(library.ggml_nelements(tensor), np.float32)
                library.ggml_backend_tensor_get(tensor, part.ctypes.data, 0, part.nbytes)
                self._pending.append(part)
            return True

        self.callback = lc.ggml_backend_sched_eval_callback(on_tensor)

    def watch(self, block: int | None) -> None:
        """Block i's input is the output of block i - 1; block 0's is the embedding, named by architecture."""
        self._parts, self._pending = [], []
        if block is None:
            self._names = frozenset()
        else:
            self._names = frozenset({f"l_out-{block - 1}".encode()} if block else {b"inp_embd", b"embd"})

    def rows(self, n: int, n_embd: int, skip_last: int = 0) -> Floats:
        """The last `n` rows (n, n_embd) collected, before the `skip_last` newest ones."""
        if not self._parts:
            raise EngineUnavailable("this architecture's graph does not name its block outputs; BP cannot be used")
        rows = np.concatenate([part.reshape(-1, n_embd) for part in self._parts])
        stop = len(rows) - skip_last
        if stop < n:
            raise EngineUnavailable(f"the tap collected {stop} rows where {n} were computed")
        return rows[stop - n : stop]

    def settle(self, complete: bool) -> None:
        """Keeps what a decode produced, or drops it where the decode was interrupted and will be repeated."""
        if complete:
            self._parts += self._pending
        self._pending = []

    def clear(self) -> None:
        self._parts = []


def write_control_vector(path: Path, control: Floats) -> None:
    """Writes (n_layer - 1, n_embd) as llama.cpp's own control vector format: tensors direction.1, direction.2, …"""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "agentd")
    writer.add_uint32("controlvector.layer_count", len(control))
    for layer, row in enumerate(control):
        writer.add_tensor(f"direction.{layer + 1}", np.ascontiguousarray(row, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_control_vector(path: Path, n_layer: int, n_embd: int) -> Floats:
    """Reads a control vector; layers the file does not name are zero. Raises ValueError."""
    control = np.zeros((n_layer - 1, n_embd), dtype=np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        prefix, _, number = tensor.name.partition(".")
        if (
            prefix != "direction"
            or not number.isdigit()
            or not 1 <= int(number) < n_layer
            or tensor.data.size != n_embd
        ):
            raise ValueError(f"unexpected tensor {tensor.name} of {tensor.data.size} values")
        control[int(number) - 1] = tensor.data
    if not np.isfinite(control).all():
        raise ValueError("it holds values that are not finite")
    return control


def load_lora(model: Any, path: Path) -> Any:
    """An adapter handle on the model. Raises ValueError."""
    handle = lc.llama_adapter_lora_init(model, str(path).encode())
    if not handle:
        raise ValueError(last_words())
    return handle
