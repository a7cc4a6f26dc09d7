"""A model's forward at theta + scale z while its weights stay as they are.

Weights are never perturbed in place: bf16 would not come back (w + e - e differs from w), and whoever is served in
between must see clean ones. A layer's perturbed weights are made in a scratch of at most its size right before it
multiplies with them, and are gone when it has. Large matrices go by pieces of rows, an embedding by the rows it looks
up, so the scratch stays in the processor's cache. z costs one random bit a weight (directions), which is less than to
keep it for the second sign.

What a module computes must go through its own `forward`: a model that reaches into another module's weight (instead of
sharing the parameter, as tied heads do) would meet clean weights there.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from agentd.learn.weights.directions import Direction

_PIECE = 1 << 20  # weights in one piece of a matrix
_ROWS = 64  # bf16 products have a multiple of so many rows: oneDNN compiles code for every number of rows it meets


class Perturbation:
    """Runs `model` at perturbed weights.

    `numbers` gives for each selected parameter the number that keys its z (a tied parameter has one number), and
    `thresholds` for a number the magnitude above which entries are left alone (sparse MeZO).
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Direction,
        numbers: Mapping[nn.Parameter, int],
        thresholds: Mapping[int, float],
    ) -> None:
        self._direction, self._numbers, self._thresholds = direction, dict(numbers), thresholds
        self._owners = [
            module
            for module in model.modules()
            if any(parameter in self._numbers for parameter in module.parameters(recurse=False))
        ]

    @contextlib.contextmanager
    def __call__(self, seed: int, scale: float) -> Iterator[None]:
        """Within it, forwards of the model are those of theta + scale z(seed). Leaves the model as it was, always."""
        wrapped: list[nn.Module] = []
        try:
            for module in self._owners:
                own = vars(module).get("forward")
                if own is not None and type(module) in (nn.Linear, nn.Embedding):
                    raise RuntimeError(f"the forward of a {type(module).__name__} is replaced already")
                wrapped.append(module)
                vars(module)["forward"] = self._forward(module, seed, scale)
            yield
        finally:
            for module in wrapped:
                vars(module).pop("forward", None)

    def weight(self, parameter: nn.Parameter, seed: int, scale: float) -> Tensor:
        """All of a selected parameter's perturbed entries, in its shape."""
        return self._piece(parameter, seed, scale, 0, parameter.numel()).view(parameter.shape)

    def _forward(self, module: nn.Module, seed: int, scale: float) -> Callable[..., Any]:
        if type(module) is nn.Linear:
            return lambda input: self._linear(module, input, seed, scale)
        if type(module) is nn.Embedding and module.max_norm is None:
            return lambda input: self._embedding(module, input, seed, scale)
        plain = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = {name: p for name, p in module._parameters.items() if p is not None and p in self._numbers}
            try:
                for name, parameter in own.items():
                    # A plain tensor: what registers parameters would look at its type.
                    module._parameters[name] = self.weight(parameter, seed, scale)  # type: ignore[assignment]
                return plain(module, *args, **kwargs)
            finally:
                module._parameters.update(own)

        return forward

    def _linear(self, module: nn.Linear, x: Tensor, seed: int, scale: float) -> Tensor:
        weight, bias = module.weight, self._small(module.bias, seed, scale)
        rows = x.reshape(-1, module.in_features)
        n = len(rows)
        if weight.dtype == torch.bfloat16 and x.device.type == "cpu" and n > 1 and n % _ROWS:
            rows = torch.cat([rows, rows.new_zeros(-n % _ROWS, module.in_features)])
        if weight not in self._numbers:
            y = linear(rows, weight, bias)
        else:
            step = rows_of(module.in_features, _PIECE)
            if module.out_features <= step:
                y = linear(rows, self.weight(weight, seed, scale), bias)
            else:
                y = rows.new_empty(len(rows), module.out_features)
                for first in range(0, module.out_features, step):
                    end = min(first + step, module.out_features)
                    part = self._piece(weight, seed, scale, first * module.in_features, end * module.in_features)
                    part = part.view(end - first, module.in_features)
                    y[:, first:end] = linear(rows, part, None if bias is None else bias[first:end])
        return y[:n].view(*x.shape[:-1], module.out_features)

    def _embedding(self, module: nn.Embedding, ids: Tensor, seed: int, scale: float) -> Tensor:
        weight = module.weight
        unique, place = torch.unique(ids, return_inverse=True)
        rows = embedding(unique, weight)
        number = self._numbers[weight]
        z = self._direction.rows(seed, number, unique, module.embedding_dim, weight.dtype, weight.device)
        self._mask(z, rows, number)
        return embedding(place, torch.add(rows, z, alpha=scale))

    def _small(self, parameter: nn.Parameter | None, seed: int, scale: float) -> Tensor | None:
        if parameter is None or parameter not in self._numbers:
            return parameter
        return self.weight(parameter, seed, scale)

    def _piece(self, parameter: nn.Parameter, seed: int, scale: float, start: int, end: int) -> Tensor:
        weight = parameter.detach().reshape(-1)[start:end]
        number = self._numbers[parameter]
        z = self._direction.piece(seed, number, start, end - start, weight.dtype, weight.device)
        self._mask(z, weight, number)
        return torch.add(weight, z, alpha=scale)

    def _mask(self, z: Tensor, weight: Tensor, number: int) -> None:
        if number in self._thresholds:
            z *= weight.abs() <= self._thresholds[number]


def rows_of(width: int, entries: int) -> int:
    """How many rows of `width` make a piece of about `entries`, such that pieces begin where random words do."""
    unit = 256 // math.gcd(256, width)
    return max(unit, entries // width // unit * unit)
