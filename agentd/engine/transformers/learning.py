"""What a session's updates move: the weights themselves, in a copy of their own, or low-rank changes beside them.

Either is made from a rule and from the weights that the session uses, and given up as a whole. The weights that serve
are never written: `OnWeights` copies them before the first update, `OnChanges` reads them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from agentd.engine.protocol import Change, Rule
from agentd.engine.transformers.model import Model, Weights
from agentd.errors import InvalidRequest
from agentd.learn.weights import adazeta, lora
from agentd.learn.weights.adamw import AdamW
from agentd.learn.weights.bp import Backpropagation
from agentd.learn.weights.lora import Beside
from agentd.learn.weights.mezo import InPlace
from agentd.learn.weights.structure import blocks_of, split

_BEFORE, _BEHIND = "base_model.model.", ".lora_{}.weight"  # PEFT's names in adapter_model.safetensors


class Descent(Protocol):
    """What applies gradients that backward passes have left, see learn.weights.bp."""

    @property
    def parameters(self) -> list[torch.Tensor]: ...
    def trained(self) -> contextlib.AbstractContextManager[None]: ...
    def apply(self, lr: float, seed: int) -> None: ...
    def drop(self) -> None: ...


class Learner(Protocol):
    """copy: the weights to compute with where they are not the session's own; `checkpointed`: the blocks whose
    activations a backward makes again; `above_trunk`: how many last blocks learn above others that stay as they are
    unless zeroth-order steps move them, 0 where there are no such others."""

    copy: Weights | None
    above_trunk: int
    checkpointed: Sequence[nn.Module]

    def theta(self) -> InPlace:
        """What zeroth-order steps move."""

    def descent(self) -> Descent:
        """What backpropagation moves. Raises InvalidRequest where nothing learns by it."""

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Within it, forwards are those of what has been learned; `copy`, or the session's weights, are in place."""

    def own(self) -> None:
        """Comes before every update: what it moves is nobody else's."""

    def moved(self) -> dict[str, torch.Tensor]:
        """What no ledger can make again, by name. Raises InvalidRequest where there is no such thing."""

    def give_up(self) -> None: ...


class OnWeights:
    """All of a model's weights, or all but the last blocks; the last blocks by backpropagation. Raises ValueError."""

    def __init__(self, model: Model, start: Weights, rule: Rule) -> None:
        self._model, self._start = model, start
        self.copy: Weights | None = None
        self._rule: dict[str, Any] = {"distribution": rule.distribution, "sparsity": rule.sparsity}
        self._theta: InPlace | None = None
        self._bp: Backpropagation | None = None
        self._suffix: frozenset[str] = frozenset()
        self.above_trunk = 0
        self.checkpointed: Sequence[nn.Module] = ()
        if rule.blocks:
            found = split(model.module, rule.blocks, tied=False)
            self._suffix = found.suffix
            self._bp = Backpropagation(model.module, found.suffix)
            trained = found.blocks[found.first :]
            self.checkpointed = trained if len(trained) > 1 else ()
            if not rule.everywhere:
                self.above_trunk = rule.blocks if found.first else 0
                self._rule["parameters"] = found.trunk.__contains__

    def theta(self) -> InPlace:
        if self._theta is None:  # thresholds come from the weights that are in place when it is made
            self._theta = InPlace(self._model.module, **self._rule)
        return self._theta

    def descent(self) -> Backpropagation:
        if self._bp is None:
            raise InvalidRequest("no blocks learn by backpropagation: the session's rule says how many")
        return self._bp

    def beside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def own(self) -> None:
        if self.copy is None:
            self.copy = Weights(self._start.image, self._model.device, private=True)

    def moved(self) -> dict[str, torch.Tensor]:
        if not self._suffix:
            raise InvalidRequest("no blocks learn by backpropagation: there is nothing to write")
        current = (self.copy or self._start).tensors
        return {part.name: current[part.name] for part in self._start.image.parts if part.name in self._suffix}

    def give_up(self) -> None:
        if self._bp is not None:
            self._bp.drop()
        if self.copy is not None:
            self._model.uninstall(self.copy)
            self.copy = None


class OnChanges:
    """Low-rank changes beside the linear layers; the weights stay as they are, and are no copy. Raises ValueError."""

    copy: Weights | None = None
    above_trunk = 0

    def __init__(self, model: Model, rule: Rule) -> None:
        assert rule.change is not None
        self._change, self._distribution = rule.change, rule.distribution
        self._beside = made(model.module, rule.change)
        self._theta: InPlace | None = None
        self._descent = AdamW(self._beside) if rule.change.differentiated else None
        blocks = blocks_of(model.module) if rule.change.differentiated else []
        self.checkpointed: Sequence[nn.Module] = blocks if len(blocks) > 1 else ()

    def theta(self) -> InPlace:
        if self._theta is None:
            self._theta = InPlace(self._beside, distribution=self._distribution)
        return self._theta

    def descent(self) -> AdamW:
        if self._descent is None:
            raise InvalidRequest("nothing learns by backpropagation: the session's rule says what does")
        return self._descent

    def beside(self) -> contextlib.AbstractContextManager[None]:
        return self._beside.attached()

    def own(self) -> None:
        """It is from the start."""

    def moved(self) -> dict[str, torch.Tensor]:
        return named(self._beside.factors())

    def give_up(self) -> None:
        if self._descent is not None:
            self._descent.drop()


def learner(model: Model, start: Weights, rule: Rule) -> Learner:
    """Raises InvalidRequest for a rule that the model cannot follow."""
    try:
        return OnWeights(model, start, rule) if rule.change is None else OnChanges(model, rule)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def made(module: nn.Module, change: Change) -> Beside:
    """Fresh changes, which change nothing yet. Raises ValueError."""
    if change.kind == "lora":
        how = {"freeze_a": change.freeze_a, "exact": not change.differentiated}
        return lora.beside(module, change.rank, change.alpha, change.seed, **how)
    if change.kind == "tensor-train":
        return adazeta.beside(module, change.rank, change.seed)
    raise ValueError(f"there are no changes of the kind {change.kind!r}")


def named(factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A and B by the names that PEFT gives them, its scale (lora_alpha / r) being 1."""
    return {
        _peft(layer, letter): each for layer, pair in factors.items() for letter, each in zip("AB", pair, strict=True)
    }


def paired(tensors: dict[str, torch.Tensor], ranks: Sequence[int]) -> Iterator[tuple[str, list[tuple[Any, Any]]]]:
    """The reverse: by layer, its factors for each of the changes that were stored one behind the other, which have
    these ranks. Raises ValueError where something is missing or does not fit."""
    behind = _BEHIND.format("A")
    layers = [name.removeprefix(_BEFORE).removesuffix(behind) for name in tensors if name.endswith(behind)]
    if 2 * len(layers) != len(tensors) or not layers or not ranks or min(ranks) < 1:
        raise ValueError("it does not hold low-rank factors in pairs")
    for layer in layers:
        a, b = (tensors.get(_peft(layer, letter)) for letter in "AB")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(a) != sum(ranks):
            raise ValueError(f"its factors of {layer} do not fit one another")
        yield layer, list(zip(torch.split(a, list(ranks)), torch.split(b, list(ranks), dim=1), strict=True))


def _peft(layer: str, letter: str) -> str:
    return _BEFORE + layer + _BEHIND.format(letter)
