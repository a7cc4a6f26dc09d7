"""Backpropagation with stateless SGD, theta <- theta - lr dL/dtheta: the first-order method of the paper.

A parameter is updated the moment its gradient is complete and the gradient is dropped (LOMO, Lv et al. 2023, algorithm
1), so that of all gradients only the largest is ever held. With checkpointing only the blocks' inputs are kept in the
forward and a block's activations are made again for its backward (Chen et al. 2016, here with every block a segment).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agentd.learn.weights import rounding
from agentd.learn.weights.replaced import replaced
from agentd.learn.weights.structure import blocks_of

_PIECE = 8 * rounding.BLOCK
_KEY = 1 << 48  # added to a parameter's number: dice apart from those of zeroth-order updates with the same seed

Loss = Callable[[], Tensor]


class Backpropagation:
    """Trains the parameters of `model` that are named, all by default; the others are frozen while a step runs."""

    def __init__(self, model: nn.Module, parameters: Collection[str] | None = None, *, checkpointing: bool = False):
        self.model, self._checkpointing = model, checkpointing
        self.theta = {
            parameter: number
            for number, (name, parameter) in enumerate(model.named_parameters())
            if parameters is None or name in parameters
        }
        for parameter in self.theta:
            rounding.check(parameter.dtype)

    def step(self, loss: Loss, lr: float, seed: int) -> float:
        """One step on the mini-batch of `loss`; returns the loss before it. `seed` keys the rounding of bf16."""
        with self.trained(), checkpointed(blocks_of(self.model)) if self._checkpointing else contextlib.nullcontext():
            value = loss()
            self.descend(value, lr, seed)
        return float(value.detach())

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """Within it exactly the parameters of theta ask for gradients."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(parameter in self.theta)
            with torch.enable_grad():
                yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)

    def descend(self, value: Tensor, lr: float, seed: int) -> None:
        """Backpropagates from `value`, updating every parameter as soon as its gradient is there.

        Raises ArithmeticError before anything has changed when `value` is not finite.
        """
        if not torch.isfinite(value):
            raise ArithmeticError(f"the loss is {float(value.detach())}: nothing to descend from")

        def update(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                descend(parameter, gradient, lr, seed, self.theta[parameter])  # type: ignore[index]

        handles = [
            parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
            for parameter in self.theta
        ]
        try:
            torch.autograd.backward(value)
        finally:
            for handle in handles:
                handle.remove()
            self.drop()

    @property
    def parameters(self) -> list[Tensor]:
        """What it trains."""
        return list(self.theta)

    def apply(self, lr: float, seed: int) -> None:
        """Descends along the gradients that backward passes have left in the parameters, and drops them.

        For a mini-batch that goes through the model in several pieces; meanwhile all gradients are held.
        """
        for parameter, number in self.theta.items():
            if parameter.grad is not None:
                descend(parameter, parameter.grad, lr, seed, number)
                parameter.grad = None

    def drop(self) -> None:
        """Forgets gradients."""
        for parameter in self.theta:
            parameter.grad = None


@torch.no_grad()
def descend(parameter: Tensor, gradient: Tensor, lr: float, seed: int, number: int) -> None:
    """parameter <- parameter - lr gradient in fp32, by pieces."""
    flat, downwards = parameter.detach().view(-1), gradient.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        delta = downwards[start : start + _PIECE].float() * -lr
        rounding.add(flat, start, delta, seed, _KEY + number)


@contextlib.contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it these blocks' activations are made again in the backward instead of kept."""
    with replaced((block, _again(block.forward)) for block in blocks):
        yield


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
