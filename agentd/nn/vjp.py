"""Vector-Jacobian products: the gradient of sum(output * its gradient), without the products.

torch.autograd takes gradients of outputs too, but looks at their shapes with its compiler's symbols, and imports sympy
for that: 35 MB and up to half a second in a process that has compiled nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch


def vjp(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """A scalar of no value of its own (0) whose derivative by each output is the gradient that is paired with it.

    pairs  (output, its gradient) of the same shape, at least one
    """
    outputs, gradients = zip(*pairs, strict=True)
    for output, gradient in zip(outputs, gradients, strict=True):
        if output.shape != gradient.shape:
            shapes = tuple(gradient.shape), tuple(output.shape)
            raise ValueError(f"a gradient of shape {shapes[0]} for an output of shape {shapes[1]}")
    end: torch.Tensor = _VJP.apply(len(outputs), *outputs, *gradients)  # type: ignore[no-untyped-call]
    return end


class _VJP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors[n:])
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, *gradients, *(None for _ in gradients)
