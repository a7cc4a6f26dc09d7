"""Backpropagation from given slopes: the gradient of sum(output * slope), without the products.

torch.autograd takes slopes too, but looks at their shapes with its compiler's symbols, and imports sympy for that: 35
MB and up to half a second in a process that has compiled nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch


def sloped(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """A scalar of no value of its own (0) whose derivative by each output is the slope that is paired with it.

    pairs  (output, slope) of the same shape, at least one
    """
    outputs, slopes = zip(*pairs, strict=True)
    for output, slope in zip(outputs, slopes, strict=True):
        if output.shape != slope.shape:
            raise ValueError(f"a slope of shape {tuple(slope.shape)} for an output of shape {tuple(output.shape)}")
    end: torch.Tensor = _Sloped.apply(len(outputs), *outputs, *slopes)  # type: ignore[no-untyped-call]
    return end


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors[n:])
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes = ctx.saved_tensors
        return None, *slopes, *(None for _ in slopes)
