"""The llama.cpp engine: one mapped model, a serving context, and a background context while there is work for it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as lc

from agentd.engine.llamacpp.adapters import Adapters, free, load
from agentd.engine.llamacpp.background import Background
from agentd.engine.llamacpp.context import Context, anonymous_mappings, release_zero_pages
from agentd.engine.llamacpp.library import load_model, metadata
from agentd.engine.llamacpp.sampling import Sampler
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.protocol import BASE, Generate, ModelInfo, Piece, Weights
from agentd.engine.serving import CHUNK, Serving
from agentd.engine.staged import Staged

_BACKGROUND_CONTEXT = 2048  # tokens: the shared prefix and one micro-batch, whatever the serving context is


class LlamaCppEngine:
    """Serves a GGUF file. `context` is the tokens one request may use; every slot has its own KV stream."""

    def __init__(
        self, path: Path, *, context: int = 4096, slots: int = 4, threads: int = 1, gpu_layers: int | str = "auto"
    ) -> None:
        self._model = load_model(path, gpu_layers)
        trained = int(lc.llama_model_n_ctx_train(self._model))
        per_slot = min(context, trained) if trained else context
        self._threads = threads
        self.vocabulary = Vocabulary(self._model)
        mappings = anonymous_mappings()
        self._context = Context(
            self._model, n_ctx=per_slot * slots, n_seq=slots, width=CHUNK, threads=threads, streams=True
        )
        per_slot = min(per_slot, self._context.n_ctx // slots)
        self.released_bytes = release_zero_pages(mappings)
        self._staged = Staged(Adapters(), self._in_use, free)
        self._serving = Serving(self._context, self.vocabulary, per_slot, self._staged, self._sampler)
        self._backgrounds: list[Background] = []
        self.info = ModelInfo(
            name=metadata(self._model, "general.name") or path.stem,
            architecture=metadata(self._model, "general.architecture") or "unknown",
            n_layer=int(lc.llama_model_n_layer(self._model)),
            n_embd=int(lc.llama_model_n_embd(self._model)),
            n_vocab=self.vocabulary.size,
            n_ctx=per_slot,
            n_ctx_train=trained,
            n_params=int(lc.llama_model_n_params(self._model)),
            size_bytes=int(lc.llama_model_size(self._model)),
            has_chat_template=self.vocabulary.has_chat_template,
        )

    @property
    def busy(self) -> bool:
        return self._serving.busy

    def submit(self, request: Generate) -> None:
        self._serving.submit(request)

    def cancel(self, key: str) -> None:
        self._serving.cancel(key)

    def step(self) -> list[Piece]:
        return self._serving.step()

    def stage(self, weights: Weights, adapter: Path | None, control: Path | None) -> None:
        self._staged.put(weights, load(self._model, weights, adapter, control))

    def unstage(self, weights: Weights) -> None:
        if weights not in (BASE, self._serving.weights):
            self._staged.remove(weights)

    def swap(self, weights: Weights) -> float:
        start = time.perf_counter()
        self._serving.swap(weights)
        self._staged.sweep()
        return time.perf_counter() - start

    def background(self, interrupted: Callable[[], bool]) -> Background:
        background = Background(
            self._model,
            self.vocabulary,
            self._staged,
            n_ctx=min(_BACKGROUND_CONTEXT, self.info.n_ctx),
            threads=self._threads,
            interrupted=interrupted,
            closed=self._closed,
        )
        self._backgrounds.append(background)
        return background

    def stats(self) -> dict[str, Any]:
        staged = {"staged": self._staged.names, "leaving": self._staged.leaving}
        return {**self._serving.counts(), "weights": self._serving.weights, **staged}

    def close(self) -> None:
        for background in list(self._backgrounds):
            background.close()
        self._serving.close()
        self._context.close()
        lc.llama_model_free(self._model)  # and with it what is staged

    def _sampler(self, request: Generate) -> Sampler:
        return Sampler(self._context.pointer, self.vocabulary.pointer, self.vocabulary.size, request)

    def _closed(self, background: Background) -> None:
        self._backgrounds.remove(background)
        self._staged.sweep()

    def _in_use(self, adapters: Adapters) -> bool:
        if self._serving.uses(adapters) or any(background.uses(adapters) for background in self._backgrounds):
            return True
        self._context.release(adapters)
        return False
