"""A tensor of int8 mantissas with one exponent: its value is mantissa * 2**exponent."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agentd.int8.invalid import InvalidInput

LIMIT = 127  # -128 is never used: its magnitude needs an eighth bit


@dataclass(frozen=True)
class Int8Tensor:
    """`mantissa` is int8 in [-127, 127]; `exponent` a Python integer, so it cannot overflow."""

    mantissa: Tensor
    exponent: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mantissa.shape)

    def __getitem__(self, index: Tensor | slice) -> "Int8Tensor":
        """Examples of a batch, along the first dimension."""
        return Int8Tensor(self.mantissa[index], self.exponent)


def exponent_for(largest: float) -> int:
    """The smallest exponent at which `largest` (>= 0) fits 127 mantissas."""
    if largest == 0:
        return -7
    _, power = math.frexp(largest)  # largest = fraction * 2**power, 0.5 <= fraction < 1
    exponent = power - 7
    return exponent if round(math.ldexp(largest, -exponent)) <= LIMIT else exponent + 1


def quantise(values: Tensor, exponent: int | None = None) -> Int8Tensor:
    """Nearest int8 tensor of a floating-point one; the step from floats to integers.

    The exponent is a power of two that keeps the values (no rescaling), so that biases and layers keep their relation;
    a given exponent clips what does not fit. Raises InvalidInput for integers, an empty tensor, NaN and infinity.
    """
    if not values.is_floating_point():
        raise InvalidInput(f"only floating-point values are quantised, and these are {dtype_name(values)}")
    if values.numel() == 0:
        raise InvalidInput(f"an array of shape {tuple(values.shape)} has no entries")
    values = values.detach().to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise InvalidInput("the array has entries that are NaN or infinite")
    if exponent is None:
        exponent = exponent_for(float(values.abs().max()))
    # In two factors: one alone leaves the range of doubles for extreme exponents.
    half = exponent // 2
    scaled = values * math.ldexp(1.0, -half) * math.ldexp(1.0, half - exponent)
    return Int8Tensor(scaled.round().clamp(-LIMIT, LIMIT).to(torch.int8), exponent)


def dequantise(tensor: Int8Tensor) -> Tensor:
    """The values as float32."""
    return torch.ldexp(tensor.mantissa.to(torch.float64), torch.tensor(tensor.exponent)).to(torch.float32)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
