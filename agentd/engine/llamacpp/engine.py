"""The llama.cpp engine: one mapped model, a serving context, and a background context while there is work for it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as lc

from agentd.engine.llamacpp.background import Background, load_lora, read_control_vector
from agentd.engine.llamacpp.context import Adapters, Context, anonymous_mappings, release_zero_pages
from agentd.engine.llamacpp.library import load_model, metadata
from agentd.engine.llamacpp.serving import CHUNK, Serving
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.protocol import Generate, ModelInfo, Piece, Weights
from agentd.errors import RevisionCorrupt

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
        self._serving = Serving(self._context, self.vocabulary, per_slot)
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
        if weights in self._serving.staged and self._serving.in_use(weights):
            return  # revisions are immutable: what is loaded under this name is the same
        try:
            vector = None if control is None else read_control_vector(control, self.info.n_layer, self.info.n_embd)
            lora = None if adapter is None else load_lora(self._model, adapter)
        except Exception as error:  # a corrupt GGUF makes the reader fail in many ways
            raise RevisionCorrupt(weights, f"{type(error).__name__}: {error}") from None
        self.unstage(weights)
        self._serving.stage(weights, Adapters(lora, vector))

    def unstage(self, weights: Weights) -> None:
        if not self._serving.in_use(weights):
            self._free(self._serving.unstage(weights))

    def swap(self, weights: Weights) -> float:
        if weights not in self._serving.staged:
            raise RevisionCorrupt(weights, "it was not staged")
        start = time.perf_counter()
        self._serving.swap(weights)
        return time.perf_counter() - start

    def background(self, interrupted: Callable[[], bool]) -> Background:
        return Background(
            self._model,
            self.vocabulary,
            self._serving.adapters,
            n_ctx=min(_BACKGROUND_CONTEXT, self.info.n_ctx),
            threads=self._threads,
            interrupted=interrupted,
        )

    def stats(self) -> dict[str, Any]:
        return {**self._serving.counts(), "weights": self._serving.weights, "staged": self._serving.staged}

    def close(self) -> None:
        self._context.close()
        for weights in self._serving.staged:
            self._free(self._serving.unstage(weights))
        lc.llama_model_free(self._model)

    def _free(self, adapters: Adapters | None) -> None:
        if adapters is not None and adapters.lora:
            lc.llama_adapter_lora_free(adapters.lora)
