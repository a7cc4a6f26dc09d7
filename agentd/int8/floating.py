"""The same networks in fp32: what is quantised, and what integers are compared with.

Batch normalisation uses the batch's statistics while it trains.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from agentd.int8.architecture import Architecture, BatchNorm, Conv, Flatten, Layer, Linear, MaxPool, ReLU
from agentd.int8.invalid import InvalidWeights


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


def _fresh_statistics(architecture: Architecture) -> dict[int, tuple[Tensor, Tensor]]:
    shapes = {p.layer: p.shape for p in architecture.parameters()}
    return {
        i: (torch.zeros(shapes[i]), torch.ones(shapes[i]))
        for i, layer in enumerate(architecture.layers)
        if isinstance(layer, BatchNorm)
    }
