"""Zeroth-order steps with an occasional step of backpropagation (after LoHo, and Addax of Li et al. 2024).

Every `period`-th step, the first included, is BP with activation checkpointing through all weights; the others are
MeZO's. The rare first-order steps carry most of the descent and need their memory only while they run; the zeroth-order
steps go on where that memory is not there. Addax adds both gradients in every step instead of taking turns.
"""

from torch import nn

from agentd.learn.weights.bp import Backpropagation, Loss
from agentd.learn.weights.mezo import InPlace


class Hybrid:
    """Takes turns. Raises ValueError for a period below 1; a period of 1 is BP."""

    def __init__(self, model: nn.Module, period: int, *, distribution: str = "rademacher") -> None:
        if period < 1:
            raise ValueError(f"a period of {period} steps is below 1")
        self.period = period
        self.zo = InPlace(model, distribution=distribution)
        self.bp = Backpropagation(model, checkpointing=True)

    def is_bp(self, step: int) -> bool:
        """Whether step `step` (from 0) is one of backpropagation."""
        return step % self.period == 0

    def step(self, step: int, loss: Loss, epsilon: float, lr_zo: float, lr_bp: float) -> float:
        """Step number `step`, which is the seed too; returns its loss (for MeZO's the mean of both)."""
        if self.is_bp(step):
            return self.bp.step(loss, lr_bp, step)
        plus, minus = self.zo.pair(step, epsilon, loss)
        self.zo.update(step, -lr_zo * (plus - minus) / (2 * epsilon))
        return (plus + minus) / 2
