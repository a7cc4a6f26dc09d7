"""ElasticZO (Sugiura and Matsutani 2025): backpropagation in the last k blocks and the head, SPSA below them.

    L+  at theta + eps z in the trunk          forward only
    L-  at theta - eps z in the trunk          the activations of the suffix are kept
    suffix   theta <- theta - lr_bp dL-/dtheta         by BP through the minus pass: no third forward
    trunk    theta <- theta - lr_zo g z,  g = (L+ - L-) / 2 eps

k = 0 is MeZO. At k = L there is no trunk, hence no z and one forward, at theta itself: BP of everything. A head tied to
the embedding belongs to the suffix; the embedding's lookup then passes no gradient, as that would go through the trunk.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agentd.learn.weights.bp import Backpropagation, Loss
from agentd.learn.weights.mezo import InPlace
from agentd.learn.weights.structure import split


@dataclass(frozen=True)
class Losses:
    """Of one step. At k = L both are the loss at theta, and the projected gradient is 0."""

    plus: float
    minus: float
    projected_gradient: float


class ElasticZO:
    """Trains all of `model` with the last k blocks by BP. Raises ValueError where k is not one of 0 .. L."""

    def __init__(self, model: nn.Module, k: int, *, distribution: str = "rademacher") -> None:
        self.split = split(model, k)
        trunk, suffix = self.split.trunk, self.split.suffix
        self.zo = InPlace(model, distribution=distribution, parameters=trunk.__contains__) if trunk else None
        self.bp = Backpropagation(model, suffix) if suffix else None

    def step(self, loss: Loss, seed: int, epsilon: float, lr_zo: float, lr_bp: float) -> Losses:
        """One step on the mini-batch of `loss`. `seed` keys z and the rounding.

        Raises ArithmeticError, with all weights as they were, when a loss is not finite.
        """
        if self.zo is None:
            assert self.bp is not None
            before = self.bp.step(loss, lr_bp, seed)
            return Losses(before, before, 0.0)
        if self.bp is None:
            plus, minus = self.zo.pair(seed, epsilon, loss)
        else:
            plus = self.zo.loss(seed, epsilon, loss)
            _check(plus)
            with self.bp.trained():
                with self.zo.perturbed(seed, -epsilon), self._lookup_detached():
                    value = loss()
                self.bp.descend(value, lr_bp, seed)
            minus = float(value.detach())
        _check(plus - minus)
        g = (plus - minus) / (2 * epsilon)
        self.zo.update(seed, -lr_zo * g)
        return Losses(plus, minus, g)

    @contextlib.contextmanager
    def _lookup_detached(self) -> Iterator[None]:
        def cut(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor) -> Tensor:
            return output.detach()

        handles = [module.register_forward_hook(cut) for module in self.split.shared]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check(value: float) -> None:
    if not torch.isfinite(torch.tensor(value)):
        raise ArithmeticError(f"the loss is {value}: nothing to descend from")
