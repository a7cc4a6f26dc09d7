"""The llama.cpp engine: one mapped model, a serving context, and a background context while there is work for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as lc

from agentd.engine.chunks import ChunkBoundaries
from agentd.engine.constraints import Constraint
from agentd.engine.language import LanguageEngine
from agentd.engine.llamacpp.adapters import Adapters, free, load
from agentd.engine.llamacpp.background import LlamaCppBackground
from agentd.engine.llamacpp.context import Context, anonymous_mappings, release_zero_pages
from agentd.engine.llamacpp.library import load_model, metadata
from agentd.engine.llamacpp.sampling import TokenSampler
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.protocol import BASE, Generate, ModelInfo, Weights
from agentd.engine.slot_prefixes import SlotPrefixes, slot_prefixes
from agentd.host.openmp import Spinning
from agentd.limits import BACKGROUND_CONTEXT


class LlamaCppEngine(LanguageEngine[Adapters, LlamaCppBackground]):
    """Serves a GGUF file. `context` is the tokens one request may use; every slot has its own KV stream.

    prefixes  {"folder", "memory", "disk", "key"} of those that are kept beyond slots: the limits in bytes, and what
              names the model's content
    """

    _context: Context

    def __init__(
        self,
        path: Path,
        *,
        context: int = 4096,
        slots: int = 4,
        threads: int = 1,
        gpu_layers: int | str = "auto",
        prefixes: dict[str, Any] | None = None,
    ) -> None:
        self._model = load_model(path, gpu_layers)
        trained = int(lc.llama_model_n_ctx_train(self._model))
        per_slot = min(context, trained) if trained else context
        self._threads, self._spinning = threads, Spinning(threads)
        self.vocabulary = Vocabulary(self._model)
        mappings = anonymous_mappings()
        own = Context(
            self._model,
            n_ctx=per_slot * slots,
            n_seq=slots,
            width=ChunkBoundaries().longest,
            threads=threads,
            streams=True,
            spinning=self._spinning,
        )
        per_slot = min(per_slot, own.n_ctx // slots)
        self.released_bytes = release_zero_pages(mappings)
        super().__init__(own, self.vocabulary, Adapters(), per_slot, self._kept(own, prefixes))
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

    def _kept(self, context: Context, settings: dict[str, Any] | None) -> SlotPrefixes[Adapters] | None:
        if settings is None:
            return None
        versions = f"llama-cpp-python {lc.__version__}"
        return slot_prefixes(settings, versions, context, lambda adapters: adapters.digest or BASE)

    def stage(self, weights: Weights, adapter: Path | None, control: Path | None) -> None:
        self._registry.put(weights, load(self._model, weights, adapter, control))

    def close(self) -> None:
        super().close()
        self._spinning.close()
        lc.llama_model_free(self._model)  # and with it what is staged

    def _open(self, interrupted: Callable[[], bool], serve: Callable[[], bool]) -> LlamaCppBackground:
        return LlamaCppBackground(
            self._model,
            self.vocabulary,
            self._registry,
            self._compiler,
            n_ctx=min(BACKGROUND_CONTEXT, self.info.n_ctx),
            threads=self._threads,
            spinning=self._spinning,
            interrupted=interrupted,
            closed=self._closed,
        )

    def _sampler(self, request: Generate, constraint: Constraint | None) -> TokenSampler:
        return TokenSampler(self._context.pointer, self.vocabulary.size, request.sampling, constraint)

    def _free(self, adapters: Adapters) -> None:
        free(adapters)

    def _let_go(self, adapters: Adapters) -> None:
        self._context.release(adapters)
