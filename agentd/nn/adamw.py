"""AdamW on a few matrices, without the compiler that torch's own class brings into the process at its first step."""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from agentd.learn.step_size import WEIGHT_DECAY


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101) on fp32 parameters.

    With the interface of `backprop.SGD`, so that a mini-batch may go through the model in pieces.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        weight_decay: float = WEIGHT_DECAY,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.parameters = list(parameters)
        self._weight_decay, self._betas = weight_decay, betas
        self._mean = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._square = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = 0

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """Within it the parameters ask for gradients."""
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def apply(self, lr: float, seed: int = 0) -> None:
        """One step along the gradients that backward passes have left in the parameters, and drops them. `seed` is
        not used: fp32 is not rounded at random."""
        self.steps += 1
        beta1, beta2 = self._betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for parameter, mean, square in zip(self.parameters, self._mean, self._square, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            parameter.mul_(1 - lr * self._weight_decay)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.addcdiv_(mean, (square / correction2).sqrt_().add_(1e-8), value=-lr / correction1)
            parameter.grad = None

    @property
    def moments(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(parameter, mean of its gradients, mean of their squares): with `steps` all that a next step depends on."""
        return zip(self.parameters, self._mean, self._square, strict=True)

    def reset(self) -> None:
        """Forgets all steps, what their gradients were, and those that are there."""
        self.steps = 0
        self.drop()
        for moment in (*self._mean, *self._square):
            moment.zero_()

    def drop(self) -> None:
        """Forgets gradients."""
        for parameter in self.parameters:
            parameter.grad = None
