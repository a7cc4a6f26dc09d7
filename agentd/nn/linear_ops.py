"""Products of activations with frozen matrices of any type, with and without a low-rank update, and their gradients.

Each is one node of autograd with its derivative written out. Composed of torch's own operations a linear layer with
LoRA is a dozen nodes, and adding the update in place makes autograd copy the gradient: more work than multiplying is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from agentd.limits import ROW_STEP
from agentd.nn.matrix import Matrix

_exactly = False


@contextmanager
def exactly() -> Iterator[None]:
    """Within it matrices are multiplied in the activations' type, whatever theirs is.

    For comparisons of two ways to compute the same. Products in bfloat16 make one bit of float32 half a percent, on
    processors and for shapes that no one can foresee, and then nothing tells rounding from a difference.
    """
    global _exactly
    before, _exactly = _exactly, True
    try:
        yield
    finally:
        _exactly = before


def frozen(x: torch.Tensor, weight: torch.Tensor | Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias (..., out) in x's type for x (..., in), multiplied in the type of W (out, in), which is frozen."""
    if isinstance(weight, torch.Tensor) and weight.dtype == x.dtype:
        return linear(x, weight, bias)
    y: torch.Tensor = _Frozen.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def adapted(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """x (W + scale B A)^T + bias for x (..., in), a frozen W (out, in), and a (rank, in) and b (out, rank) of x's type.

    x, a and b get gradients; the low-rank part is computed in x's type, for any type of W.
    """
    y: torch.Tensor = _Adapted.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return y


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        y = _outputs(x.reshape(-1, x.shape[-1]), weight)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (gradient,), weight = gradients, ctx.weight
        if not ctx.needs_input_grad[0]:
            return None, None, None
        by_x = _inputs(gradient.reshape(-1, len(weight)), weight)
        return by_x.view(*gradient.shape[:-1], weight.shape[1]), None, None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | Matrix,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = a @ rows.T  # (rank, rows): with a few rows on the left products take a half to a third of the time
        ctx.save_for_backward(x, a, b, low)
        ctx.weight, ctx.scale = weight, scale
        y = _outputs(rows, weight).addmm_(low.T, b.T, alpha=scale)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, a, b, low), weight = ctx.saved_tensors, ctx.weight
        gradient = gradients[0].reshape(-1, len(weight))
        by_low = (b.T @ gradient.T).mul_(ctx.scale)
        by_a = by_low @ x.reshape(-1, x.shape[-1])
        by_b = (low @ gradient).mul_(ctx.scale).T
        by_x = _inputs(gradient, weight).addmm_(by_low.T, a).view(x.shape) if ctx.needs_input_grad[0] else None
        return by_x, None, None, by_a, by_b, None


def _outputs(rows: torch.Tensor, weight: torch.Tensor | Matrix) -> torch.Tensor:
    """rows W^T (n, out) for rows (n, in)."""
    if isinstance(weight, torch.Tensor):
        return _multiply(rows, weight.T)
    y = rows.new_empty(len(rows), len(weight))
    given = rows if _exactly else _narrow(rows, weight.dtype)
    for begin, end, part in weight.parts():
        y[:, begin:end] = _multiply(given, part.T)[: len(rows)]
    return y


def _inputs(gradient: torch.Tensor, weight: torch.Tensor | Matrix) -> torch.Tensor:
    """gradient W (n, in) for a gradient (n, out)."""
    if isinstance(weight, torch.Tensor):
        return _multiply(gradient, weight)
    x = gradient.new_zeros(len(gradient), weight.width)
    for begin, end, part in weight.parts():
        if weight.dtype == gradient.dtype:
            x.addmm_(gradient[:, begin:end], part)
        else:
            x += _multiply(gradient[:, begin:end], part)
    return x


def _multiply(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows @ matrix, multiplied in the matrix's type, in memory of its own and in the rows' type.

    In a narrower type there are rows of zeros besides, see `_rounded`.
    """
    if matrix.dtype == rows.dtype or _exactly:
        return rows @ matrix.to(rows.dtype)
    return (_narrow(rows, matrix.dtype) @ matrix)[: len(rows)].to(rows.dtype)


def _narrow(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows in another type, and rows of zeros; as they are where they are of that type."""
    if rows.dtype == dtype:
        return rows
    n = len(rows)
    narrow = torch.empty(_rounded(n), rows.shape[-1], dtype=dtype)
    narrow[:n], narrow[n:] = rows, 0
    return narrow


def _rounded(rows: int) -> int:
    """Up to a multiple of 32, of 64 beyond 256, of 128 beyond 512, and so on: four to eight numbers between n and 2 n.

    oneDNN compiles code for every shape that it meets, hardly two micro-batches have as many rows, and the code stays:
    3 MB for each number. With multiples of 64 alone a step of small micro-batches takes a tenth more time, with
    multiples of 16 it takes no less.
    """
    step = max(ROW_STEP, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step
