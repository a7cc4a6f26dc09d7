"""Parts of a block as one node of autograd each: less is kept for the backward pass, and less memory is gone through.

transformers' norm and gated activation are a handful of torch's operations, every one of which keeps its input. Nothing
is assumed of an architecture: a module is replaced only where values and gradients stay what they were.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from agentd.nn.vjp import vjp

Forward = Callable[[torch.Tensor], torch.Tensor]
_PARTS = ("gate_proj", "up_proj", "down_proj")
_TOLERANCE = 1e-5  # of the largest value, where float32 adds up in another order


def fuse(blocks: Iterable[nn.Module], sample: nn.Module) -> list[str]:
    """Replaces what can be in `blocks`, whose like `sample` is: one of them, with its weights in memory.

    Returns the names of the modules replaced, as they are within a block.
    """
    replaced = {}
    for name, module in sample.named_modules():
        forward = _fused(module)
        if forward is not None and _agree(module.forward, forward, _width(module)):
            replaced[name] = type(module)
    for block in blocks:
        for name, module in block.named_modules():
            forward = _fused(module) if replaced.get(name) is type(module) else None
            if forward is not None:
                module.forward = forward
    return list(replaced)


def _fused(module: nn.Module) -> Forward | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = len(inspect.signature(module.forward).parameters) == 1  # some norms take a gate besides
    if set(module._parameters) == {"weight"} and isinstance(eps, float) and not module._modules and alone:
        return partial(_norm, module, eps)
    is_gated = all(isinstance(getattr(module, part, None), nn.Linear) for part in _PARTS)
    return partial(_gated, module) if is_gated else None


def _width(module: nn.Module) -> int:
    weight: Any = getattr(module, _PARTS[0], module).weight
    return int(weight.shape[-1])


def _agree(plain: Forward, fused: Forward, width: int) -> bool:
    """Whether both give the same for random input, and the same gradient for a random one of what comes out."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, width, generator=generator)
    output_gradient = torch.randn(2, 3, width, generator=generator)
    results = []
    for forward in (plain, fused):
        own = x.clone().requires_grad_()
        try:
            y = forward(own)
            (gradient,) = torch.autograd.grad(vjp([(y, output_gradient)]), own)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        results.append((y.detach(), gradient))
    return all(
        ours.dtype == theirs.dtype and (ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max()
        for theirs, ours in zip(*results, strict=True)
    )


def _norm(module: nn.Module, eps: float, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _RMSNorm.apply(x, module.weight, eps)  # type: ignore[no-untyped-call]
    return y


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    activated: torch.Tensor = _GatedSiLU.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    y: torch.Tensor = module.down_proj(activated)
    return y


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y: torch.Tensor = (x * inverse).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        by_normed = gradients[0] * weight
        along = torch.linalg.vecdot(by_normed, x).unsqueeze(-1).mul_(inverse.square()).div_(x.shape[-1])
        by_x: torch.Tensor = by_normed.addcmul_(x, along, value=-1).mul_(inverse)
        return by_x, None, None


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up (SwiGLU's activation, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        by_up = silu(gate).mul_(gradients[0])
        by_gate: torch.Tensor = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return by_gate, by_up
