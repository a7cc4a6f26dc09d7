"""AdamW over a few matrices, without what torch's own class brings into the process."""

import math

import torch


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), over all matrices at once.

    torch's own class brings the compiler into the process with its first step.
    """

    def __init__(self, parameters: list[torch.Tensor], weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.parameters, self.weight_decay, self.betas = parameters, weight_decay, betas
        self.mean = [torch.zeros_like(parameter) for parameter in parameters]
        self.square = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Applies the gradients and clears them."""
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for parameter, mean, square in zip(self.parameters, self.mean, self.square, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            parameter.mul_(1 - lr * self.weight_decay)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.addcdiv_(mean, (square / correction2).sqrt_().add_(1e-8), value=-lr / correction1)
            parameter.grad = None


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to 10 %; step counts from 1."""
    warm_up = max(1, math.ceil(0.05 * steps))
    if step <= warm_up:
        return step / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
