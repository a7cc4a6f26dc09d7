"""Stateless SGD, theta <- theta - lr dL/dtheta, by the gradients that backward passes leave in the parameters.

A mini-batch goes through the model in several forwards; their gradients add up and are applied at once. With
checkpointing only the blocks' inputs are kept in the forward, and a block's activations are made again for its backward
(Chen et al. 2016, here with every block a segment).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agentd.nn import stochastic_rounding
from agentd.nn.forward_patch import replaced

_KEY = 1 << 48  # added to a parameter's number: dice apart from those of zeroth-order updates with the same seed


class SGD:
    """Trains the parameters of `model` that are named, all by default; the others are frozen meanwhile."""

    def __init__(self, model: nn.Module, parameters: Collection[str] | None = None) -> None:
        self.model = model
        self.theta = {
            parameter: number
            for number, (name, parameter) in enumerate(model.named_parameters())
            if parameters is None or name in parameters
        }
        for parameter in self.theta:
            stochastic_rounding.check(parameter.dtype)

    @property
    def parameters(self) -> list[Tensor]:
        """What it trains."""
        return list(self.theta)

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

    @torch.no_grad()
    def apply(self, lr: float, seed: int) -> None:
        """One step down the gradients in the parameters, in fp32 and by pieces; drops them. `seed` keys the rounding
        of bf16."""
        for parameter, number in self.theta.items():
            if parameter.grad is None:
                continue
            flat, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
            for start in range(0, len(flat), stochastic_rounding.PIECE):
                delta = gradient[start : start + stochastic_rounding.PIECE].float() * -lr
                stochastic_rounding.add(flat, start, delta, seed, _KEY + number)
            parameter.grad = None

    def drop(self) -> None:
        """Forgets gradients."""
        for parameter in self.theta:
            parameter.grad = None


@contextlib.contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it these blocks' activations are made again in the backward instead of kept."""
    with replaced((block, _again(block.forward)) for block in blocks):
        yield


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
