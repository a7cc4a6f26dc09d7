"""Products of activations with frozen matrices of any type, with and without a low-rank update, and their gradients.

Each is one node of autograd with its derivative written out. Composed of torch's own operations a linear layer with
LoRA is a dozen nodes, and adding the update in place makes autograd copy the gradient: more work than multiplying is.
"""

from typing import Any

import torch
from torch.nn.functional import linear

_ROWS = 64  # of which a product of a narrower type has a multiple, see `_multiply`


def frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias (..., out) in x's type for x (..., in), multiplied in the type of W (out, in), which is frozen."""
    if weight.dtype == x.dtype:
        return linear(x, weight, bias)
    y: torch.Tensor = _Frozen.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def adapted(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """x (W + scale B A)^T + bias for x (..., in), a frozen W (out, in), and a (rank, in) and b (out, rank) of x's type.

    x, a and b get gradients; the low-rank part is computed in x's type whatever that of W is.
    """
    y: torch.Tensor = _Adapted.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return y


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        y = _multiply(x.reshape(-1, x.shape[-1]), weight.T)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        by_x = _multiply(gradient.reshape(-1, len(weight)), weight)
        return by_x.view(*gradient.shape[:-1], weight.shape[1]), None, None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = a @ rows.T  # (rank, rows): with a few rows on the left products take a half to a third of the time
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        y = _multiply(rows, weight.T).addmm_(low.T, b.T, alpha=scale)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, len(weight))
        by_low = (b.T @ gradient.T).mul_(ctx.scale)
        by_a = by_low @ x.reshape(-1, x.shape[-1])
        by_b = (low @ gradient).mul_(ctx.scale).T
        by_x = _multiply(gradient, weight).addmm_(by_low.T, a).view(x.shape) if ctx.needs_input_grad[0] else None
        return by_x, None, None, by_a, by_b, None


def _multiply(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows @ matrix, multiplied in the matrix's type, in memory of its own and in the rows' type.

    In a narrower type rows of zeros make their number a multiple of `_ROWS`: oneDNN compiles code for every shape that
    it meets, and hardly two micro-batches have as many rows. That took longer than multiplying, and the code stayed.
    """
    if matrix.dtype == rows.dtype:
        return rows @ matrix
    n = len(rows)
    narrow = torch.empty(-(-n // _ROWS) * _ROWS, rows.shape[-1], dtype=matrix.dtype)
    narrow[:n], narrow[n:] = rows, 0
    return (narrow @ matrix)[:n].to(rows.dtype)
