"""Tensor-train adapters for zeroth-order steps (AdaZeta, Yang et al. 2024); its query count is in learn/spsa.py.

A matrix W (out, in) with in = i_1 i_2 and out = o_1 o_2 is a chain of four cores (Oseledets 2011)

    W[o_1 o_2, i_1 i_2] = G_1[i_1] G_2[i_2] G_3[o_1] G_4[o_2],      G_k (r_{k-1}, n_k, r_k),  r_0 = r_4 = 1

with some hundred numbers where the matrix has thousands: fewer dimensions, so less variance in SPSA. Such a matrix is
the adapter beside a layer's own (as in LoRETTA, Yang et al. 2024, where weights are reparametrised); contracted in the
middle it is a product of two factors, so it can be merged and stored as LoRA is. AdaZeta's own adapters have a
nonlinearity between two such matrices, which no weight can take in.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from agentd.nn.linear_layer import Layer
from agentd.nn.lora import AdapterSet


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
        a, b = self._halves()
        return linear(linear(x.to(a.dtype), a), b)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self._halves()
        return a.detach(), b.detach()

    def _halves(self) -> tuple[Tensor, Tensor]:
        """The train cut in the middle and contracted: (rank, in) and (out, rank)."""
        a = torch.einsum("ik,kjl->lij", self.core_1[0], self.core_2).reshape(-1, self.n_in)
        b = torch.einsum("lok,kp->opl", self.core_3, self.core_4[..., 0]).reshape(self.n_out, -1)
        return a, b


def adapters(model: nn.Module, rank: int, seed: int) -> AdapterSet:
    """Tensor trains beside every linear layer but the head."""

    def make(base: Layer, generator: torch.Generator) -> TTLinear:
        adapter = TTLinear(base.n_in, base.n_out, rank, generator, zero=True)
        return adapter.to(base.weight.device)

    return AdapterSet(model, make, seed)


def factors(n: int) -> tuple[int, int]:
    """The two factors of n that are nearest to one another, the smaller first."""
    small = max(i for i in range(1, math.isqrt(n) + 1) if n % i == 0)
    return small, n // small
