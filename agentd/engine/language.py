"""What every engine of a language model does alike, whatever computes its tokens: requests, weights, sessions."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any, Generic, Protocol, TypeVar

from agentd.engine.constraints import Compiler, Constraint
from agentd.engine.decoder import Decoder, Sampler
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import BASE, Background, Generate, ModelInfo, Piece, Weights
from agentd.engine.serving import Serving
from agentd.engine.session import Session
from agentd.engine.slot_prefixes import SlotPrefixes
from agentd.engine.weight_registry import W, WeightRegistry
from agentd.errors import AgentdError

logger = logging.getLogger(__name__)

W_contra = TypeVar("W_contra", contravariant=True)


class ServingContext(Decoder[W_contra], Protocol[W_contra]):
    """What serving computes in; `close` frees its caches."""

    def close(self) -> None: ...


class OwnedBackground(Background, Protocol[W_contra]):
    """A session that the engine asks what it computes with."""

    def uses(self, weights: W_contra) -> bool: ...


B = TypeVar("B", bound=OwnedBackground[Any])


class LanguageEngine(ABC, Generic[W, B]):
    """An engine over one serving context. `base` is what it makes of the base model, `per_slot` the tokens that one
    request may use. A subclass sets `info`."""

    info: ModelInfo

    def __init__(
        self,
        context: ServingContext[W],
        vocabulary: Prompts,
        base: W,
        per_slot: int,
        prefixes: SlotPrefixes[W] | None = None,
    ) -> None:
        self._context, self._prompts, self._prefixes = context, vocabulary, prefixes
        self._registry: WeightRegistry[W] = WeightRegistry(base, self._in_use, self._free)
        self._compiler = Compiler(vocabulary)
        self._serving = Serving(
            context, vocabulary, per_slot, self._registry, self._sampler, self._compiler, prefixes=prefixes
        )
        self._backgrounds: list[B] = []

    # --- what differs

    @abstractmethod
    def _sampler(self, request: Generate, constraint: Constraint | None) -> Sampler:
        """Raises InvalidRequest."""

    @abstractmethod
    def _free(self, weights: W) -> None:
        """Gives up weights that no one computes with."""

    @abstractmethod
    def _open(self, interrupted: Callable[[], bool], serve: Callable[[], bool]) -> B:
        """A new session (see `protocol.Engine.background`), which calls `_closed` when it ends."""

    def _let_go(self, weights: W) -> None:
        """Takes weights out of the serving context, as no one is served with them any more."""

    # --- requests

    @property
    def busy(self) -> bool:
        return self._serving.busy

    def submit(self, request: Generate) -> None:
        self._serving.submit(request)

    def embed(self, key: str, input: dict[str, Any]) -> None:
        self._serving.embed(key, input)

    def prepare(self) -> None:
        try:
            self._prompts.prepare()
        except Exception as error:  # a template may raise anything; each conversation is told of it
            logger.warning("the chat template: %s", error)

    def refusal(self, input: dict[str, Any]) -> str | None:
        try:
            return None if self._prompts.prompt(input) else "the prompt is empty"
        except AgentdError as error:
            return str(error)

    def cancel(self, key: str) -> None:
        self._serving.cancel(key)

    def step(self) -> list[Piece]:
        return self._serving.step()

    # --- weights

    def unstage(self, weights: Weights) -> None:
        if weights not in (BASE, self._serving.weights):
            self._registry.remove(weights)

    def swap(self, weights: Weights) -> float:
        start = time.perf_counter()
        self._serving.swap(weights)
        self._registry.collect()
        return time.perf_counter() - start

    def warming(self, weights: Weights, interrupted: Callable[[], bool]) -> Generator[None, None, int]:
        return self._serving.warming(weights, interrupted)

    def tend(self) -> bool:
        return not self._backgrounds and self._serving.tend()

    def forget(self, before: float | None) -> None:
        self._serving.forget(before)

    # --- background work

    def background(self, interrupted: Callable[[], bool], serve: Callable[[], bool] = lambda: False) -> B:
        background = self._open(interrupted, serve)
        self._backgrounds.append(background)
        self._freeze()
        return background

    def session(self, interrupted: Callable[[], bool], serve: Callable[[], bool]) -> Session:
        return Session(self.background(interrupted, serve))

    def stats(self) -> dict[str, Any]:
        staged = {"staged": self._registry.names, "leaving": self._registry.retired}
        return {**self._serving.counts(), "weights": self._serving.weights, **staged}

    def close(self) -> None:
        for background in list(self._backgrounds):
            background.close()
        self._serving.close()
        self._compiler.close()
        if self._prefixes is not None:
            self._prefixes.store.close()
        self._context.close()

    def _closed(self, background: B) -> None:
        self._backgrounds.remove(background)
        self._freeze()
        self._registry.collect()

    def _freeze(self) -> None:
        """While a session is open memory is what was left when its work was planned."""
        if self._prefixes is not None:
            self._prefixes.store.frozen = bool(self._backgrounds)

    def _in_use(self, weights: W) -> bool:
        if self._serving.uses(weights) or any(background.uses(weights) for background in self._backgrounds):
            return True
        self._let_go(weights)
        return False
