"""The transformers engine: one module in torch, weights mapped from disk, serving and learning in turns.

Preemption is by block: a forward of background work asks before every block whether somebody waits. See background.py
for how a model learns in place while it serves, and lineage.py for what a revision is.
"""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from agentd.engine.protocol import BASE, Generate, ModelInfo, Piece
from agentd.engine.protocol import Weights as Name
from agentd.engine.serving import Serving
from agentd.engine.staged import Staged
from agentd.engine.transformers.background import LONGEST, Background
from agentd.engine.transformers.context import Context
from agentd.engine.transformers.image import finished
from agentd.engine.transformers.lineage import Lineage
from agentd.engine.transformers.loading import Source, load
from agentd.engine.transformers.model import Model, Weights
from agentd.engine.transformers.sampling import Sampler
from agentd.errors import RevisionCorrupt


class TransformersEngine:
    """Serves a safetensors directory or a GGUF file. `context` is the tokens one request may use.

    folder     where images of weights are kept; with `key` it identifies the model's content
    revisions  the directory of revisions, in which a ledger's parents are found

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
    ) -> None:
        torch.set_num_threads(threads)
        loaded = load(Source(path, folder, key), dtype, device)
        self.model = Model(loaded)
        config = self.model.config.get_text_config()
        trained = int(getattr(config, "max_position_embeddings", 0) or 0)
        per_slot = min(context, trained) if trained else context
        self.vocabulary = loaded.vocabulary
        self.lineage = Lineage(self.model, revisions, folder)
        self._context = Context(self.model, slots)
        self._staged = Staged(self.model.base, self._in_use, self._free)
        self._serving = Serving(
            self._context, self.vocabulary, per_slot, self._staged, lambda request: Sampler(self.vocabulary, request)
        )
        self._backgrounds: list[Background] = []
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

    @property
    def busy(self) -> bool:
        return self._serving.busy

    def submit(self, request: Generate) -> None:
        self._serving.submit(request)

    def cancel(self, key: str) -> None:
        self._serving.cancel(key)

    def step(self) -> list[Piece]:
        return self._serving.step()

    def staging(self, weights: Name, adapter: Path | None, control: Path | None) -> Generator[None, None, None]:
        """`adapter` is a ledger. Yields after every replayed step, so that serving need not wait."""
        if control is not None:
            raise RevisionCorrupt(weights, "the engine transformers has no control vectors")
        found = self.model.base
        if adapter is not None:
            found = yield from self.lineage.build(weights, adapter)
        self._staged.put(weights, found)

    def stage(self, weights: Name, adapter: Path | None, control: Path | None) -> None:
        finished(self.staging(weights, adapter, control))

    def unstage(self, weights: Name) -> None:
        if weights not in (BASE, self._serving.weights):
            self._staged.remove(weights)

    def swap(self, weights: Name) -> float:
        start = time.perf_counter()
        self._serving.swap(weights)
        self._staged.sweep()
        return time.perf_counter() - start

    def replaying(self, ledger: Path) -> Generator[None, None, str]:
        """Replays a revision from the base anew and returns the sha256 of its weights."""
        return (yield from self.lineage.verify("verified", ledger))

    def background(self, interrupted: Callable[[], bool]) -> Background:
        background = Background(
            self.model,
            self._staged,
            limit=min(LONGEST, self.info.n_ctx),
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

    def _closed(self, background: Background) -> None:
        self._backgrounds.remove(background)
        self._staged.sweep()

    def _in_use(self, weights: Weights) -> bool:
        return self._serving.uses(weights) or any(background.uses(weights) for background in self._backgrounds)

    def _free(self, weights: Weights) -> None:
        if weights is not self.model.base:
            self.model.uninstall(weights)
            self.lineage.prune({path for each in self._staged.values() for path in each.image.files})
