"""ElasticZO in fp32: the yardstick for the integers of agentd/int8/elastic.py, and what makes weights to quantise.

    g = (loss+ - loss-) / 2 epsilon,   theta <- theta - lr_zo g z below the cutoff,   SGD with lr_bp above it

MeZO's order: theta + epsilon z, theta - epsilon z, then one sweep restores and updates, theta + (epsilon - lr g) z.
BP uses the minus pass's activations, so no third forward is needed. z ~ N(0, I), from a generator keyed by (seed,
tensor).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from agentd.int8.floating import FloatNetwork

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class FloatStepResult:
    """Mean losses over the batch, in nats; with full BP there is one, and both fields hold it."""

    loss_plus: float
    loss_minus: float
    projected_gradient: float


class ElasticFloat:
    """Trains `network` in place with the last `bp_layers` layers by BP."""

    def __init__(self, network: FloatNetwork, bp_layers: int, epsilon: float = 1e-2, clip: float = 100.0) -> None:
        self.network, self.epsilon, self.clip = network, epsilon, clip
        self.cutoff = network.architecture.cutoff(bp_layers)
        self.below = [p.index for p in network.described if p.layer < self.cutoff]
        self.above = [p.index for p in network.described if p.layer >= self.cutoff]

    def step(self, x: Tensor, labels: Tensor, seed: int, *, lr_zo: float, lr_bp: float) -> FloatStepResult:
        """One step on a batch. The projected gradient is clipped at `clip`."""
        if not self.below:
            minus, gradients = self._minus(x, labels)
            plus, g = minus, 0.0
        else:
            self.shift(seed, self.epsilon)
            with torch.no_grad():
                plus = float(functional.cross_entropy(self.network.forward(x, training=True), labels))
            self.shift(seed, -2 * self.epsilon)
            minus, gradients = self._minus(x, labels)
            g = max(-self.clip, min(self.clip, (plus - minus) / (2 * self.epsilon)))
            self.shift(seed, self.epsilon - lr_zo * g)
        for i, gradient in zip(self.above, gradients, strict=True):
            self.network.parameters[i] -= lr_bp * gradient
        return FloatStepResult(plus, minus, g)

    def shift(self, seed: int, scale: float) -> None:
        """theta <- theta + scale z(seed) below the cutoff."""
        for i in self.below:
            generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + i) & _MASK >> 1)
            p = self.network.parameters[i]
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)

    def _minus(self, x: Tensor, labels: Tensor) -> tuple[float, Sequence[Tensor]]:
        with torch.no_grad():
            x = self.network.forward(x, stop=self.cutoff, training=True)
            if not self.above:
                return float(functional.cross_entropy(x, labels)), []
        learning = [self.network.parameters[i].requires_grad_() for i in self.above]
        loss = functional.cross_entropy(self.network.forward(x, self.cutoff, training=True), labels)
        gradients = torch.autograd.grad(loss, learning)
        for p in learning:
            p.requires_grad_(False)
        return float(loss.detach()), gradients


def accuracy(network: FloatNetwork, x: Tensor, labels: Tensor, batch: int = 1000) -> tuple[int, int]:
    """(right, all) of a data set."""
    with torch.no_grad():
        parts = [network.forward(x[start : start + batch]).argmax(1) for start in range(0, len(x), batch)]
    return int((torch.cat(parts) == labels).sum()), len(labels)
