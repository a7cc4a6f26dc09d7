"""AdamW (Loshchilov and Hutter 2019) on a few parameters in fp32: what low-rank changes learn with by backpropagation.

torch's own, with the interface of `bp.Backpropagation`, so that a mini-batch may go through the model in pieces.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

WEIGHT_DECAY = 0.0


class AdamW:
    """Trains all parameters of `changes`; they ask for gradients only within `trained`."""

    def __init__(self, changes: nn.Module) -> None:
        self._parameters = list(changes.parameters())
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self._parameters, weight_decay=WEIGHT_DECAY)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What it trains."""
        return list(self._parameters)

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """Within it the changes ask for gradients."""
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(False)

    def apply(self, lr: float, seed: int) -> None:
        """One step along the gradients that backward passes have left in the parameters, and drops them. `seed` is
        not used: fp32 is not rounded by dice."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forgets gradients."""
        for parameter in self._parameters:
            parameter.grad = None
