"""The analytic memory of backpropagation and MeZO, in the paper's symbols.

Source: Katti, Sifaou, Park, Rajendran, Simeone, "On-Device Fine-Tuning via Backprop-Free Zeroth-Order Optimization",
2025, equations (1)-(3); the activations are those of Korthikanti et al. 2023. A decoder-only transformer with global
multi-head attention, one dense feed-forward network per layer, stateless SGD; norms are ignored. It is the theory:
`budget.footprint` is what this software allocates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Transformer:
    """A model and a workload. All memory below is in bytes.

    N context length in tokens, L layers, D hidden dimension, H attention heads, V vocabulary, B batch, b bytes per
    parameter, L_kept (the paper's L') the layers of activations that an implementation of MeZO keeps: 0 is the ideal,
    L is what BP keeps.
    """

    N: int
    L: int
    D: int
    H: int
    V: int
    B: int = 1
    b: float = 2
    L_kept: float = 1


LLAMA_2_7B = Transformer(N=2048, L=32, D=4096, H=32, V=32000)
NAMED = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": Transformer(N=2048, L=40, D=5120, H=40, V=32000),
    "gpt2-medium": Transformer(N=1024, L=24, D=1024, H=16, V=50257),
    "smollm2-135m": Transformer(N=2048, L=30, D=576, H=9, V=49152),
}
"""Models of the paper, and agentd's default one, with two bytes a parameter."""

SWEPT = {
    "N": (1, 2048, 4096, 8192, 16384, 32768),
    "L": (1, 2, 4, 8, 16, 32, 64, 100, 1000),
    "D": (512, 1024, 2048, 4096, 8192, 16384, 32768),
}
"""The values of context length, depth and width that the paper's comparison goes through."""


def parameters(m: Transformer, n_m: int | None = None, r: float | None = None) -> float:
    """Parameters: 4 D^2 (attention) and N_M D R (feed-forward) per layer, 2 V D for embedding and head.

    Without `n_m` (matrices of the network) and `r` (its hidden size): N_M R = 8 D, as in GPT-2 and Llama 2.
    """
    feed_forward = 8.0 * m.D**2 if n_m is None or r is None else n_m * m.D * r
    return m.L * (4 * m.D**2 + feed_forward) + 2 * m.V * m.D


def activations(m: Transformer, *, checkpointing: bool = False) -> float:
    """Equation (1): A = B L N D (2 + 16 b + (2 b + 1) N H / D); with checkpointing sqrt(L) in place of L."""
    layers = math.sqrt(m.L) if checkpointing else m.L
    return m.B * layers * m.N * m.D * (2 + 16 * m.b + (2 * m.b + 1) * m.N * m.H / m.D)


def backpropagation(m: Transformer, *, checkpointing: bool = False) -> float:
    """Equation (2): M_BP = 24 b L D^2 + 4 b V D + A: weights, as many gradients, activations."""
    return 24 * m.b * m.L * m.D**2 + 4 * m.b * m.V * m.D + activations(m, checkpointing=checkpointing)


def mezo(m: Transformer) -> float:
    """Equation (3): M_MeZO = 12 b L D^2 + 2 b V D + (L'/L) A. Nothing is kept for a backward pass."""
    return 12 * m.b * m.L * m.D**2 + 2 * m.b * m.V * m.D + m.L_kept / m.L * activations(m)


def ratio(m: Transformer, *, checkpointing: bool = False) -> float:
    """M_BP / M_MeZO."""
    return backpropagation(m, checkpointing=checkpointing) / mezo(m)


@dataclass(frozen=True)
class Point:
    """One value of a swept symbol; memory in bytes. `checkpointed` is BP with activation checkpointing."""

    value: int
    backpropagation: float
    checkpointed: float
    mezo: float

    @property
    def ratio(self) -> float:
        return self.backpropagation / self.mezo

    @property
    def ratio_checkpointed(self) -> float:
        return self.checkpointed / self.mezo

    def as_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "bp_bytes": self.backpropagation,
            "bp_checkpointing_bytes": self.checkpointed,
            "mezo_bytes": self.mezo,
            "ratio": self.ratio,
            "ratio_checkpointing": self.ratio_checkpointed,
        }


def sweep(m: Transformer, symbol: str, values: Iterable[int]) -> list[Point]:
    """The memory of `m` with one of its symbols ("N", "L" or "D") at each of `values`: a panel of Fig. 3."""
    points = []
    for value in values:
        changed = replace(m, **{symbol: value})
        checkpointed = backpropagation(changed, checkpointing=True)
        points.append(Point(value, backpropagation(changed), checkpointed, mezo(changed)))
    return points


def figure_3(m: Transformer, points: int = 60) -> dict[str, list[Point]]:
    """The curves of Fig. 3 for `m`: symbol -> points on a logarithmic axis, as wide as the paper's or as m needs."""
    ranges = {"N": (512, max(32768, 2 * m.N)), "L": (1, max(100, 2 * m.L)), "D": (min(512, m.D), max(32768, 2 * m.D))}
    curves = {}
    for symbol, (low, high) in ranges.items():
        steps = (round(low * (high / low) ** (i / (points - 1))) for i in range(points))
        curves[symbol] = sweep(m, symbol, dict.fromkeys(steps))
    return curves
