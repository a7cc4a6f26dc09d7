"""ElasticZO in fp32: the same networks, the same split, as the yardstick for the integers.

    g = (loss+ - loss-) / 2 epsilon,   theta <- theta - lr_zo g z below the cutoff,   SGD with lr_bp above it

MeZO's order: theta + epsilon z, theta - epsilon z, then one sweep restores and updates, theta + (epsilon - lr g) z.
BP uses the minus pass's activations, so no third forward is needed. z ~ N(0, I), from a generator keyed by (seed,
tensor). Batch normalisation uses the batch's statistics while it trains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from agentd.learn.int8.architecture import Architecture, BatchNorm, Conv, Flatten, Layer, Linear, MaxPool, ReLU
from agentd.learn.int8.errors import InvalidWeights

_MASK = (1 << 64) - 1


class FloatNetwork:
    """An architecture with fp32 parameters in the order of `architecture.parameters()`.

    `statistics` holds the running mean and variance of each batch normalisation, by layer index.
    """

    def __init__(
        self,
        architecture: Architecture,
        parameters: Sequence[Tensor],
        statistics: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.architecture = architecture
        self.described = architecture.parameters()
        self.parameters = [p.detach().to(torch.float32).clone() for p in parameters]
        shapes = [tuple(p.shape) for p in self.parameters]
        if shapes != [p.shape for p in self.described]:
            raise InvalidWeights(architecture.name, [f"their shapes are {shapes}"])
        self.statistics = {
            layer: (mean.clone(), var.clone()) for layer, (mean, var) in (statistics or {}).items()
        } or _fresh_statistics(architecture)

    @classmethod
    def initialised(cls, architecture: Architecture, seed: int) -> "FloatNetwork":
        """Weights uniform in +-sqrt(6 / fan in) (He et al. 2015), biases in +-sqrt(1 / fan in)."""
        generator = torch.Generator().manual_seed(seed)
        parameters: list[Tensor] = []
        bound = 1.0
        for p in architecture.parameters():
            if isinstance(architecture.layers[p.layer], BatchNorm):
                parameters.append(torch.full(p.shape, float(p.name.endswith("weight"))))
                continue
            if p.name.endswith("weight"):
                bound = math.prod(p.shape[1:]) ** -0.5
            gain = math.sqrt(6) if p.name.endswith("weight") else 1.0
            parameters.append((torch.rand(p.shape, generator=generator) * 2 - 1) * gain * bound)
        return cls(architecture, parameters)

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None, *, training: bool = False) -> Tensor:
        """Layers `start` to `stop` on a batch; the whole network gives logits of shape (B, classes)."""
        layers = self.architecture.layers
        for i in range(start, len(layers) if stop is None else stop):
            x = self._layer(i, layers[i], x, training)
        return x

    def copy(self) -> "FloatNetwork":
        return FloatNetwork(self.architecture, self.parameters, self.statistics)

    def _layer(self, i: int, layer: Layer, x: Tensor, training: bool) -> Tensor:
        own = [self.parameters[p.index] for p in self.described if p.layer == i]
        bias = own[1] if len(own) == 2 else None
        if isinstance(layer, Conv):
            return functional.conv2d(x, own[0], bias, layer.stride, layer.padding)
        if isinstance(layer, Linear):
            return functional.linear(x, own[0], bias)
        if isinstance(layer, ReLU):
            return functional.relu(x)
        if isinstance(layer, MaxPool):
            return functional.max_pool2d(x, layer.size)
        if isinstance(layer, Flatten):
            return x.flatten(1)
        if isinstance(layer, BatchNorm):
            rows = x if x.dim() == 4 else x.reshape(-1, x.shape[-1])
            return functional.batch_norm(rows, *self.statistics[i], own[0], bias, training=training).view_as(x)
        return x.flatten(2).amax(2) if x.dim() == 4 else x.amax(1)


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


def _fresh_statistics(architecture: Architecture) -> dict[int, tuple[Tensor, Tensor]]:
    shapes = {p.layer: p.shape for p in architecture.parameters()}
    return {
        i: (torch.zeros(shapes[i]), torch.ones(shapes[i]))
        for i, layer in enumerate(architecture.layers)
        if isinstance(layer, BatchNorm)
    }
