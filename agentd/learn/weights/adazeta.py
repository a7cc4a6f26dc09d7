"""Tensor-train adapters and a growing query count for zeroth-order steps (AdaZeta, Yang et al. 2024).

A matrix W (out, in) with in = i_1 i_2 and out = o_1 o_2 is a chain of four cores (Oseledets 2011)

    W[o_1 o_2, i_1 i_2] = G_1[i_1] G_2[i_2] G_3[o_1] G_4[o_2],      G_k (r_{k-1}, n_k, r_k),  r_0 = r_4 = 1

with some hundred numbers where the matrix has thousands: fewer dimensions, so less variance in SPSA. An adapter is a
bottleneck of two such matrices with a GELU between, added to a layer's output (Houlsby et al. 2019). As the directions
of a step say less and less when the loss falls, the number of queries a step grows with the epoch e = 1, 2, ...:

    Q(e) = min(ceil(alpha e^beta), Q_max)
"""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from agentd.learn.weights.lora import put


class TTLinear(nn.Module):
    """x (..., in) -> (..., out) through tensor-train cores in fp32, without bias; `zero` starts it as the zero map."""

    def __init__(self, n_in: int, n_out: int, rank: int, generator: torch.Generator, *, zero: bool = False) -> None:
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        sizes = [*factors(n_in), *factors(n_out)]
        ranks = [1, rank, rank, rank, 1]
        cores = [
            torch.randn(ranks[i], n, ranks[i + 1], generator=generator) / (ranks[i] * (n if i < 2 else 1)) ** 0.5
            for i, n in enumerate(sizes)
        ]
        if zero:
            cores[-1].zero_()
        self.core_1, self.core_2, self.core_3, self.core_4 = (nn.Parameter(core) for core in cores)

    def forward(self, x: Tensor) -> Tensor:
        g1, g2, g3, g4 = self.core_1, self.core_2, self.core_3, self.core_4
        tensor = x.reshape(-1, g1.shape[1], g2.shape[1])
        low = torch.einsum("bij,ik,kjl->bl", tensor, g1[0], g2)
        return torch.einsum("bl,lok,kp->bop", low, g3, g4[..., 0]).reshape(*x.shape[:-1], self.n_out)


class TTAdapter(nn.Module):
    """A layer and an adapter on its output: y + up(gelu(down(y))), which is y at the start."""

    def __init__(self, base: nn.Linear, bottleneck: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.tt_down = TTLinear(base.out_features, bottleneck, rank, generator)
        self.tt_up = TTLinear(bottleneck, base.out_features, rank, generator, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        change: Tensor = self.tt_up(gelu(self.tt_down(y.float())))
        return y + change.to(y.dtype)


def attach(
    model: nn.Module,
    bottleneck: int,
    rank: int,
    seed: int,
    *,
    targets: Callable[[str], bool] = lambda name: name.endswith(("o_proj", "down_proj")),
) -> list[TTAdapter]:
    """Puts adapters on the linear layers whose names `targets` accepts: by default those that end attention and FFN.

    Raises ValueError when there is none.
    """
    adapters = []
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and targets(name):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            adapter = TTAdapter(module, bottleneck, rank, generator).to(module.weight.device).train(model.training)
            put(model, name, adapter)
            adapters.append(adapter)
    if not adapters:
        raise ValueError("the model has no linear layer of that name to put an adapter on")
    return adapters


def names(model: nn.Module) -> frozenset[str]:
    """The parameters that the adapters train."""
    return frozenset(name for name, _ in model.named_parameters() if ".tt_" in name)


def queries(epoch: int, *, alpha: float = 1.0, beta: float = 0.5, most: int = 8) -> int:
    """Q(e) for the epoch counted from 1. Raises ValueError for an epoch below 1."""
    if epoch < 1:
        raise ValueError(f"epochs count from 1, not {epoch}")
    return min(math.ceil(alpha * math.pow(epoch, beta)), most)


def factors(n: int) -> tuple[int, int]:
    """The two factors of n that are nearest to one another, the smaller first."""
    small = max(i for i in range(1, math.isqrt(n) + 1) if n % i == 0)
    return small, n // small
