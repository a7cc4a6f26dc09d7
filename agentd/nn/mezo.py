"""MeZO on all weights of a model (Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes").

    g = (L(theta + eps z) - L(theta - eps z)) / 2 eps        definition 1 (SPSA)
    theta <- theta - lr g z                                  definition 2 and algorithm 1 (ZO-SGD)

With n seeds a step this is n-SPSA (theta moves along the mean of the n estimates). z is made again from its seed; it is
Gaussian in the paper and of random signs here unless asked otherwise, which have the same mean and covariance, a little
less variance in g, and cost one random bit a weight. Sparse MeZO (Liu et al. 2024) leaves entries above a magnitude
alone: z becomes m * z with m = [|theta| <= h], h being a quantile of each matrix.

The published implementation sweeps the weights four times (+eps, -2 eps, +eps, update) with a Gaussian generator.
Here the weights are written once a step, by the update, and both signs' forwards make theirs in scratch.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from agentd.learn.ledger import Step, fold
from agentd.learn.update_rule import UpdateRule
from agentd.nn import stochastic_rounding
from agentd.nn.directions import ROOM, Direction
from agentd.nn.perturbation import Perturbation

Loss = Callable[[], "Tensor | float"]
"""Runs a forward of the model on a mini-batch and returns its loss: a tensor of one number, or a number."""


class InPlace:
    """theta = the parameters of `model` that are selected; they hold clean weights whenever no method of this runs.

    distribution  of z, and the `sparsity` of what it moves: see learn.update_rule
    parameters    which parameters are theta, by name; None takes all
    thresholds    magnitudes by name that `sparsity` gave before (`.thresholds`): they come from the weights at hand, so
                  a run that is continued or replayed is given those it began with

    Parameters that modules share count once. A parameter's number, which keys its z, is its place among all of the
    model's, for any selection. Raises ValueError for weights that are neither fp32 nor bf16, an empty selection, or
    arguments out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distribution: str = "rademacher",
        sparsity: float | None = None,
        parameters: Callable[[str], bool] | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        UpdateRule(distribution, sparsity)  # raises ValueError
        self.model = model
        self.theta: dict[str, tuple[int, nn.Parameter]] = {
            name: (number, parameter)
            for number, (name, parameter) in enumerate(model.named_parameters())
            if parameters is None or parameters(name)
        }
        if not self.theta:
            raise ValueError("no parameter of the model is selected")
        for _, parameter in self.theta.values():
            stochastic_rounding.check(parameter.dtype)
            if not parameter.is_contiguous():
                raise ValueError("a parameter is not contiguous in memory, so it cannot be updated in pieces")
        if thresholds is None and sparsity:
            thresholds = {name: _quantile(p, 1 - sparsity) for name, (_, p) in self.theta.items() if p.dim() > 1}
        self.thresholds = dict(thresholds or {})
        if unknown := sorted(set(self.thresholds) - set(self.theta)):
            raise ValueError(f"there is a threshold for {unknown[0]}, which is not selected")
        self._direction = Direction(distribution)
        self._limits = {self.theta[name][0]: value for name, value in self.thresholds.items()}
        numbers: dict[Tensor, int] = {parameter: number for number, parameter in self.theta.values()}
        self.perturbed = Perturbation(model, self._direction, numbers, self._limits)

    def pair(self, seed: int, epsilon: float, loss: Loss) -> tuple[float, float]:
        """(L(theta + epsilon z), L(theta - epsilon z)). The weights are not touched, even if `loss` raises."""
        return self.loss(seed, epsilon, loss), self.loss(seed, -epsilon, loss)

    def loss(self, seed: int, scale: float, loss: Loss) -> float:
        """L(theta + scale z); at scale 0 that of theta."""
        with torch.no_grad():
            if scale == 0:
                return float(loss())
            with self.perturbed(seed, scale):
                return float(loss())

    def update(self, seed: int, coefficient: float) -> None:
        """theta <- theta + coefficient z(seed), for good: fp32 arithmetic, bf16 weights by stochastic rounding."""
        with torch.no_grad():
            scratch = torch.empty(stochastic_rounding.PIECE + ROOM)
            for number, parameter in self.theta.values():
                flat = parameter.detach().view(-1)
                for start in range(0, flat.numel(), stochastic_rounding.PIECE):
                    n = min(stochastic_rounding.PIECE, flat.numel() - start)
                    z = self._direction.piece(seed, number, start, n, torch.float32, flat.device, coefficient, scratch)
                    if number in self._limits:
                        z *= flat[start : start + n].float().abs() <= self._limits[number]
                    stochastic_rounding.add(flat, start, z, seed, number)
        self._direction.release()

    def replay(self, steps: Sequence[Step]) -> None:
        """The updates of `steps` in order: bit for bit what making them did."""
        for seed, coefficient in fold(steps):
            self.update(seed, coefficient)


def _quantile(parameter: nn.Parameter, q: float) -> float:
    """The q-quantile of |parameter|."""
    magnitudes = parameter.detach().abs().view(-1)
    return float(magnitudes.kthvalue(max(1, round(q * magnitudes.numel()))).values)
