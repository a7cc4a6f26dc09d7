"""A network of int8 tensors: forward over a batch, and back from the logits to a cutoff."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentd.int8 import layers
from agentd.int8.architecture import Architecture, Conv, Linear, MaxPool, Parameter, ReLU
from agentd.int8.invalid import InvalidInput, InvalidWeights
from agentd.int8.tensor import LIMIT, Int8Tensor, dtype_name


@dataclass(frozen=True)
class Activation:
    """A layer's input and output, kept for the backward pass."""

    layer: int
    x: Int8Tensor
    y: Int8Tensor


class Int8Network:
    """An architecture with its int8 parameters, in the order of `architecture.parameters()`.

    The mantissas of `parameters` are updated in place; exponents never change. Raises InvalidWeights.
    """

    def __init__(self, architecture: Architecture, parameters: Sequence[Int8Tensor]) -> None:
        self.architecture = architecture
        self.parameters = list(parameters)
        self.described = architecture.parameters()
        _check(architecture, self.described, self.parameters)
        self._shapes = architecture.shapes()

    def check(self, x: Int8Tensor) -> Int8Tensor:
        """`x` if it is a batch of examples for this network. Raises InvalidInput."""
        if x.mantissa.dtype != torch.int8:
            raise InvalidInput(f"an input's mantissas are int8, not {dtype_name(x.mantissa)}")
        if x.shape[1:] != self.architecture.input or x.shape[0] == 0:
            shape = ", ".join(map(str, self.architecture.input))
            raise InvalidInput(f"{self.architecture.name} takes arrays of shape (n, {shape}), n > 0, not {x.shape}")
        if int(x.mantissa.amin()) < -LIMIT:
            raise InvalidInput("the mantissa -128 is not used; clip inputs to -127")
        return x

    def forward(
        self, x: Int8Tensor, *, scratch: "Scratch | None" = None, record_from: int | None = None
    ) -> tuple[Int8Tensor, list[Activation]]:
        """Logits of shape (B, classes) for a checked batch, and the activations of the layers from `record_from` on.

        `scratch` supplies each layer's parameters as they are needed (perturbed ones); without it, the network's own.
        """
        layout = self.architecture.layers
        record_from = len(layout) if record_from is None else record_from
        if len(self.architecture.input) == 3:
            x = Int8Tensor(x.mantissa.movedim(1, -1).contiguous(), x.exponent)
        activations: list[Activation] = []
        i = 0
        while i < len(layout):
            weights = self.weights(i) if scratch is None else scratch.weights(i)
            if i >= record_from:
                y, used = layers.forward(layout[i], weights, x), 1
                activations.append(Activation(i, x, y))
            else:
                y, used = self._fused(i, weights, x, record_from)
            x, i = y, i + used
        return x, activations

    def backward(self, activations: list[Activation], error: Int8Tensor) -> Iterator[tuple[Parameter, Tensor]]:
        """Yields (parameter, gradient as int32 or int64) from the last layer to the first one kept.

        A layer's error is passed on before its gradients are yielded, so the caller may update at once.
        """
        last = activations[0].layer if activations else 0
        while activations:
            step = activations.pop()
            layer, weights = self.architecture.layers[step.layer], self.weights(step.layer)
            at_output = error
            if step.layer > last:
                error = layers.backward(layer, weights, step.x, step.y, at_output)
            if weights:
                own = [parameter for parameter in self.described if parameter.layer == step.layer]
                yield from zip(own, layers.gradients(layer, weights, step.x, at_output), strict=True)

    def weights(self, layer: int) -> list[Int8Tensor]:
        """The parameters of one layer: none, the weight, or the weight and the bias."""
        return [self.parameters[p.index] for p in self.described if p.layer == layer]

    def copy(self) -> "Int8Network":
        copies = [Int8Tensor(p.mantissa.clone(), p.exponent) for p in self.parameters]
        return Int8Network(self.architecture, copies)

    def _fused(self, i: int, weights: list[Int8Tensor], x: Int8Tensor, stop: int) -> tuple[Int8Tensor, int]:
        """Layer i with the ReLU and the pooling behind it, where that gives the same; and how many layers it took."""
        layout = self.architecture.layers
        layer = layout[i]
        if not isinstance(layer, (Conv, Linear)):
            return layers.forward(layer, weights, x), 1
        used = 1
        rectify = i + used < stop and isinstance(layout[i + used], ReLU)
        used += rectify
        if isinstance(layer, Linear):
            return layers.linear(weights, x, rectify=rectify), used
        after = layout[i + used] if i + used < stop else None
        if isinstance(after, MaxPool) and layers.can_pool(layer, self._shapes[i], after.size):
            return layers.conv(layer, weights, x, rectify=rectify, pool=after.size), used + 1
        return layers.conv(layer, weights, x, rectify=rectify), used


class Scratch:
    """Supplies a layer's parameters for one pass; what it makes lives only while that layer runs."""

    def weights(self, layer: int) -> list[Int8Tensor]:
        raise NotImplementedError


def _check(architecture: Architecture, described: list[Parameter], parameters: list[Int8Tensor]) -> None:
    if len(described) != len(parameters):
        raise InvalidWeights(architecture.name, [f"{len(described)} tensors are needed, and {len(parameters)} given"])
    problems = []
    for parameter, tensor in zip(described, parameters, strict=True):
        if tensor.shape != parameter.shape:
            problems.append(f"{parameter.name} has shape {tensor.shape} instead of {parameter.shape}")
        elif tensor.mantissa.dtype != torch.int8:
            problems.append(f"{parameter.name} is {dtype_name(tensor.mantissa)} instead of int8")
        elif int(tensor.mantissa.amin()) < -LIMIT:
            problems.append(f"{parameter.name} has the mantissa -128, which is not used")
    if problems:
        raise InvalidWeights(architecture.name, problems)
