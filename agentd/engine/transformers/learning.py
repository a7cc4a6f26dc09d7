"""What a session's updates move: the weights themselves, in a copy of their own, or low-rank adapters beside them.

Either is made from a rule and from the weights that the session uses, and given up as a whole. The weights that serve
are never written: `WeightLearner` copies them before the first update, `AdapterLearner` reads them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from agentd.engine.protocol import AdapterSpec, LearningRule
from agentd.engine.transformers.model import Model, Weights
from agentd.errors import InvalidRequest
from agentd.nn import lora, tensor_train
from agentd.nn.adamw import AdamW
from agentd.nn.backprop import SGD
from agentd.nn.lora import AdapterSet
from agentd.nn.mezo import InPlace
from agentd.nn.structure import block_list, split

_PREFIX, _SUFFIX = "base_model.model.", ".lora_{}.weight"  # PEFT's names in adapter_model.safetensors


class Optimiser(Protocol):
    """What goes down the gradients that backward passes have left: nn.backprop.SGD, nn.adamw.AdamW."""

    @property
    def parameters(self) -> list[torch.Tensor]: ...
    def trained(self) -> contextlib.AbstractContextManager[None]: ...
    def apply(self, lr: float, seed: int) -> None: ...
    def drop(self) -> None: ...


class Trainable(Protocol):
    """copy: the weights to compute with where they are not the session's own; `checkpointed`: the blocks whose
    activations a backward makes again; `above_trunk`: how many last blocks learn above others that stay as they are
    unless zeroth-order steps move them, 0 where there are no such others."""

    copy: Weights | None
    above_trunk: int
    checkpointed: Sequence[nn.Module]

    def theta(self) -> InPlace:
        """What zeroth-order steps move."""

    def optimiser(self) -> Optimiser:
        """What backpropagation moves. Raises InvalidRequest where nothing learns by it."""

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """Within it, forwards are those of what has been learned; `copy`, or the session's weights, are in place."""

    def own(self) -> None:
        """Comes before every update: what it moves is no one else's."""

    def moved(self) -> dict[str, torch.Tensor]:
        """What no ledger can make again, by name. Raises InvalidRequest where there is no such thing."""

    def give_up(self) -> None: ...


class WeightLearner:
    """All of a model's weights, or all but the last blocks; the last blocks by backpropagation. Raises ValueError."""

    def __init__(self, model: Model, start: Weights, rule: LearningRule) -> None:
        self._model, self._start = model, start
        self.copy: Weights | None = None
        self._rule: dict[str, Any] = {"distribution": rule.distribution, "sparsity": rule.sparsity}
        self._theta: InPlace | None = None
        self._optimiser: SGD | None = None
        self._suffix: frozenset[str] = frozenset()
        self.above_trunk = 0
        self.checkpointed: Sequence[nn.Module] = ()
        if rule.blocks:
            cut = split(model.module, rule.blocks)
            self._suffix = cut.suffix
            self._optimiser = SGD(model.module, cut.suffix)
            trained = cut.blocks[cut.first :]
            self.checkpointed = trained if len(trained) > 1 else ()
            if not rule.everywhere:
                self.above_trunk = rule.blocks if cut.first else 0
                self._rule["parameters"] = cut.trunk.__contains__

    def theta(self) -> InPlace:
        if self._theta is None:  # thresholds come from the weights that are in place when it is made
            self._theta = InPlace(self._model.module, **self._rule)
        return self._theta

    def optimiser(self) -> SGD:
        if self._optimiser is None:
            raise InvalidRequest("no blocks learn by backpropagation: the session's rule says how many")
        return self._optimiser

    def attached(self) -> contextlib.AbstractContextManager[None]:
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
        if self._optimiser is not None:
            self._optimiser.drop()
        if self.copy is not None:
            self._model.uninstall(self.copy)
            self.copy = None


class AdapterLearner:
    """Low-rank adapters beside the linear layers; the weights stay as they are, and are no copy. Raises ValueError."""

    copy: Weights | None = None
    above_trunk = 0

    def __init__(self, model: Model, rule: LearningRule) -> None:
        assert rule.adapters is not None
        self._distribution = rule.distribution
        self._adapters = adapters_of(model.module, rule.adapters).requires_grad_(False)
        self._theta: InPlace | None = None
        self._optimiser = AdamW(self._adapters.parameters()) if rule.adapters.differentiated else None
        self.checkpointed: Sequence[nn.Module] = ()
        if rule.adapters.differentiated and len(blocks := list(block_list(model.module))) > 1:
            self.checkpointed = blocks

    def theta(self) -> InPlace:
        if self._theta is None:
            self._theta = InPlace(self._adapters, distribution=self._distribution)
        return self._theta

    def optimiser(self) -> AdamW:
        if self._optimiser is None:
            raise InvalidRequest("nothing learns by backpropagation: the session's rule says what does")
        return self._optimiser

    def attached(self) -> contextlib.AbstractContextManager[None]:
        return self._adapters.attached()

    def own(self) -> None:
        """It is from the start."""

    def moved(self) -> dict[str, torch.Tensor]:
        return to_peft(self._adapters.factors())

    def give_up(self) -> None:
        if self._optimiser is not None:
            self._optimiser.drop()


def learner(model: Model, start: Weights, rule: LearningRule) -> Trainable:
    """Raises InvalidRequest for a rule that the model cannot follow."""
    try:
        return WeightLearner(model, start, rule) if rule.adapters is None else AdapterLearner(model, rule)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def adapters_of(module: nn.Module, spec: AdapterSpec) -> AdapterSet:
    """Fresh adapters, which change nothing yet. Raises ValueError."""
    if spec.kind == "lora":
        return lora.adapters(module, spec.rank, spec.alpha, spec.seed, exact=not spec.differentiated)
    if spec.kind == "tensor-train":
        return tensor_train.adapters(module, spec.rank, spec.seed)
    raise ValueError(f"there are no adapters of the kind {spec.kind!r}")


def to_peft(factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A and B by the names that PEFT gives them, its scale (lora_alpha / r) being 1."""
    return {
        _peft(layer, letter): each for layer, pair in factors.items() for letter, each in zip("AB", pair, strict=True)
    }


def from_peft(tensors: dict[str, torch.Tensor], ranks: Sequence[int]) -> Iterator[tuple[str, list[tuple[Any, Any]]]]:
    """The reverse: by layer, its factors for each of the adapters that were stored one behind the other, which have
    these ranks. Raises ValueError where something is missing or does not fit."""
    suffix = _SUFFIX.format("A")
    layers = [name.removeprefix(_PREFIX).removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    if 2 * len(layers) != len(tensors) or not layers or not ranks or min(ranks) < 1:
        raise ValueError("it does not hold low-rank factors in pairs")
    for layer in layers:
        a, b = (tensors.get(_peft(layer, letter)) for letter in "AB")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(a) != sum(ranks):
            raise ValueError(f"its factors of {layer} do not fit one another")
        yield layer, list(zip(torch.split(a, list(ranks)), torch.split(b, list(ranks), dim=1), strict=True))


def _peft(layer: str, letter: str) -> str:
    return _PREFIX + layer + _SUFFIX.format(letter)
