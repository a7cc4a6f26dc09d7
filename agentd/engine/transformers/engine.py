"""The transformers engine: one module in torch, weights mapped from disk, serving and learning in turns.

Preemption is by block: before every block a forward or a backward of background work asks whether somebody waits, and
goes on when all have their answers. See background.py for how a model learns in place while it serves, and lineage.py
for what a revision is.
"""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import transformers

from agentd.engine.constraints import Constraint
from agentd.engine.language import LanguageEngine
from agentd.engine.protocol import BASE, Generate, ModelInfo
from agentd.engine.protocol import Weights as Name
from agentd.engine.slot_prefixes import slot_prefixes
from agentd.engine.transformers.background import TransformersBackground
from agentd.engine.transformers.context import Context
from agentd.engine.transformers.exporting import stacked, write_gguf
from agentd.engine.transformers.image import finished, write
from agentd.engine.transformers.learning import to_peft
from agentd.engine.transformers.lineage import Lineage
from agentd.engine.transformers.loading import Source, load
from agentd.engine.transformers.model import Model, Weights
from agentd.engine.transformers.sampling import TokenSampler
from agentd.errors import ModelUnusable, RevisionCorrupt
from agentd.host import allocator
from agentd.limits import BACKGROUND_CONTEXT


class TransformersEngine(LanguageEngine[Weights, TransformersBackground]):
    """Serves a safetensors directory or a GGUF file. `context` is the tokens one request may use.

    folder     where images of weights are kept; with `key` it identifies the model's content
    revisions  the directory of revisions, in which a ledger's parents are found
    prefixes   {"folder", "memory", "disk", "key"} of those that are kept beyond slots, as in engine llamacpp

    Raises ModelUnusable.
    """

    def __init__(
        self,
        path: Path,
        *,
        folder: Path,
        key: str,
        revisions: Path | None = None,
        context: int = 4096,
        slots: int = 4,
        threads: int = 1,
        dtype: str = "auto",
        device: str = "auto",
        prefixes: dict[str, Any] | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self._path, self._folder = path, folder
        loaded = load(Source(path, folder, key), dtype, device)
        self.model = Model(loaded)
        config = self.model.config.get_text_config()
        trained = int(getattr(config, "max_position_embeddings", 0) or 0)
        per_slot = min(context, trained) if trained else context
        self.vocabulary = loaded.vocabulary
        self.lineage = Lineage(self.model, revisions, folder)
        serving = Context(self.model, slots)
        try:
            serving.warm_up(per_slot)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ModelUnusable(path, f"it does not run: {error}") from error
        kept = None
        if prefixes is not None:
            versions = f"transformers {transformers.__version__} torch {torch.__version__} {self.model.dtype} {threads}"
            kept = slot_prefixes(prefixes, versions, serving, self._digest)
        super().__init__(serving, self.vocabulary, self.model.base, per_slot, kept)
        self.info = ModelInfo(
            name=path.stem,
            architecture=str(self.model.config.model_type),
            n_layer=self.model.n_layer,
            n_embd=self.model.n_embd,
            n_vocab=self.vocabulary.size,
            n_ctx=per_slot,
            n_ctx_train=trained,
            n_params=sum(parameter.numel() for parameter in self.model.module.parameters()),
            size_bytes=self.model.base.image.size,
            has_chat_template=self.vocabulary.has_chat_template,
        )

    def _digest(self, weights: Weights) -> str:
        """Which weights these are, after a restart too: the names of images that were made here have their sha256."""
        return BASE if weights is self.model.base else weights.image.files[0].stem

    def staging(self, weights: Name, adapter: Path | None, control: Path | None) -> Generator[None, None, None]:
        """`adapter` is a ledger. Yields after every replayed step, so that serving need not wait."""
        if control is not None:
            raise RevisionCorrupt(weights, "the engine transformers has no control vectors")
        image = self.model.base
        if adapter is not None:
            for each in self._registry.values():
                each.release()  # a second set of weights is about to be written; who needs these takes them again
            image = yield from self.lineage.build(weights, adapter)
        self._registry.put(weights, image)

    def stage(self, weights: Name, adapter: Path | None, control: Path | None) -> None:
        finished(self.staging(weights, adapter, control))

    def swap(self, weights: Name) -> float:
        seconds = super().swap(weights)
        self._spare()
        return seconds

    def replaying(self, ledger: Path) -> Generator[None, None, str]:
        """Replays a revision from the base anew and returns the sha256 of its weights."""
        return (yield from self.lineage.verify("verified", ledger))

    def collecting(self, ledger: Path, target: Path, kind: str) -> Generator[None, None, list[int]]:
        """Writes the low-rank adapters of a chain as one file, for `kind` gguf as an adapter of llama.cpp, which has to
        be all there is."""
        parts = self.lineage.adapters("exported", ledger, alone=kind == "gguf")
        yield
        try:
            factors = stacked(parts)
        except ValueError as error:
            raise RevisionCorrupt("exported", str(error)) from None
        yield
        if kind == "gguf":
            write_gguf(self._path, self.model.module, factors, target)
        else:
            write(target, to_peft(dict(factors)))
        return [rank for _, ranks in parts for rank in ranks]

    def _open(self, interrupted: Callable[[], bool], serve: Callable[[], bool]) -> TransformersBackground:
        return TransformersBackground(
            self.model,
            self._registry,
            self._compiler,
            folder=self._folder,
            limit=min(BACKGROUND_CONTEXT, self.info.n_ctx),
            interrupted=interrupted,
            serve=serve,
            closed=self._closed,
        )

    def _closed(self, background: TransformersBackground) -> None:
        super()._closed(background)
        self._spare()
        allocator.give_back()

    def _spare(self) -> None:
        """Weights that new requests do not get give their pages back; who still computes with them takes them again."""
        for each in self._registry.values():
            if each is not self._registry[self._serving.weights]:
                each.release()

    def _sampler(self, request: Generate, constraint: Constraint | None) -> TokenSampler:
        return TokenSampler(request.sampling, constraint)

    def _free(self, weights: Weights) -> None:
        if weights is not self.model.base:
            self.model.uninstall(weights)
            self.lineage.prune({path for each in self._registry.values() for path in each.image.files})
