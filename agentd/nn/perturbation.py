"""A model's forward at theta + scale z while its weights stay as they are.

Weights are never perturbed in place: bf16 would not come back (w + e - e differs from w), and whoever is served in
between must see clean ones. A layer's perturbed weights are made in a scratch of at most its size right before it
multiplies with them, and are gone when it has. Large matrices go by pieces of rows, an embedding by the rows it looks
up, so the scratch stays in the processor's cache. Of z itself one random bit a
weight is kept, from the first sign to the update.

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

from agentd.limits import PERTURBED_PIECE, PRODUCT_ROWS
from agentd.nn.directions import ROOM, Direction
from agentd.nn.forward_patch import replaced

_CHUNK = 1 << 19  # entries of z at a time


class Perturbation:
    """Runs `model` at perturbed weights.

    `numbers` gives for each selected parameter the number that keys its z (a tied parameter has one number), and
    `thresholds` for a number the magnitude above which entries are left alone (sparse MeZO). Raises ValueError for
    parameters in a container without a forward, which would not be perturbed.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Direction,
        numbers: Mapping[Tensor, int],
        thresholds: Mapping[int, float],
    ) -> None:
        self._direction, self._numbers, self._thresholds = direction, dict(numbers), thresholds
        self._sizes = {number: parameter.numel() for parameter, number in self._numbers.items()}
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._owners = [
            module
            for module in model.modules()
            if any(parameter in self._numbers for parameter in module.parameters(recurse=False))
        ]

        for module in self._owners:
            if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
                raise ValueError(f"parameters in a {type(module).__name__} cannot be perturbed: it has no forward")

    @contextlib.contextmanager
    def __call__(self, seed: int, scale: float) -> Iterator[None]:
        """Within it, forwards of the model are those of theta + scale z(seed). Leaves the model as it was, always."""
        self._direction.hold(seed, self._sizes)
        for module in self._owners:
            if "forward" in vars(module) and type(module) in (nn.Linear, nn.Embedding):
                raise RuntimeError(f"the forward of a {type(module).__name__} is replaced already")
        with replaced((module, self._forward(module, seed, scale)) for module in self._owners):
            yield

    def weight(self, parameter: Tensor, seed: int, scale: float) -> Tensor:
        """All of a selected parameter's perturbed entries, in its shape."""
        entire = torch.empty_like(parameter, requires_grad=False)
        self._make(entire.view(-1), parameter, seed, scale, 0)
        return entire

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
        if weight.dtype == torch.bfloat16 and x.device.type == "cpu" and n > 1 and n % PRODUCT_ROWS:
            rows = torch.cat([rows, rows.new_zeros(-n % PRODUCT_ROWS, module.in_features)])
        if weight not in self._numbers:
            y = linear(rows, weight, bias)
        elif torch.is_grad_enabled() and x.requires_grad:
            y = linear(rows, self.weight(weight, seed, scale), bias)  # autograd keeps the weights
        else:
            y = self._by_pieces(rows, weight, bias, seed, scale)
        return y[:n].view(*x.shape[:-1], module.out_features)

    def _by_pieces(self, rows: Tensor, weight: Tensor, bias: Tensor | None, seed: int, scale: float) -> Tensor:
        n_out, n_in = weight.shape
        step = min(n_out, rows_of(n_in, PERTURBED_PIECE))
        scratch = torch.empty(step * n_in, dtype=weight.dtype, device=weight.device)
        y = rows.new_empty(len(rows), n_out) if step < n_out else rows
        for first in range(0, n_out, step):
            end = min(first + step, n_out)
            part = scratch[: (end - first) * n_in]
            self._make(part, weight, seed, scale, first * n_in)
            if step == n_out:
                return linear(rows, part.view(-1, n_in), bias)
            torch.mm(rows, part.view(-1, n_in).T, out=y[:, first:end])
        return y if bias is None else y.add_(bias)

    def _embedding(self, module: nn.Embedding, ids: Tensor, seed: int, scale: float) -> Tensor:
        weight = module.weight
        unique, place = torch.unique(ids, return_inverse=True)
        rows = embedding(unique, weight)
        number = self._numbers[weight]
        z = self._direction.rows(seed, number, unique, module.embedding_dim, weight.dtype, weight.device)
        self._mask(z, rows, number)
        return embedding(place, torch.add(rows, z, alpha=scale))

    def _small(self, parameter: Tensor | None, seed: int, scale: float) -> Tensor | None:
        if parameter is None or parameter not in self._numbers:
            return parameter
        return self.weight(parameter, seed, scale)

    def _make(self, out: Tensor, parameter: Tensor, seed: int, scale: float, start: int) -> None:
        """Fills `out` with perturbed entries of `parameter` from `start` on."""
        flat, number = parameter.detach().view(-1), self._numbers[parameter]
        scratch = self._scratch.get(out.dtype)
        if scratch is None:
            with torch.inference_mode(False):  # it may be used again where gradients are asked for
                scratch = self._scratch[out.dtype] = torch.empty(_CHUNK + ROOM, dtype=out.dtype)
        for begin in range(0, len(out), _CHUNK):
            n = min(_CHUNK, len(out) - begin)
            weight = flat[start + begin : start + begin + n]
            z = self._direction.piece(
                seed,
                number,
                start + begin,
                n,
                out.dtype,
                out.device,
                scratch=scratch if out.device.type == "cpu" else None,
            )
            self._mask(z, weight, number)
            torch.add(weight, z, alpha=scale, out=out[begin : begin + n])

    def _mask(self, z: Tensor, weight: Tensor, number: int) -> None:
        if number in self._thresholds:
            z *= weight.abs() <= self._thresholds[number]


def rows_of(width: int, entries: int) -> int:
    """How many rows of `width` make a piece of about `entries`, such that pieces begin where random words do."""
    unit = 256 // math.gcd(256, width)
    return max(unit, entries // width // unit * unit)
