"""Integer perturbations from counter-based random bits: any tensor of any step can be made again alone.

z = Bernoulli(density / 256) mask x uniform integers in [-r_max, r_max]. The bits are Philox4x64-10's, key (seed,
tensor): 8 for the mask and 8 for the value of each entry. A value is (2 byte + 1)(2 r_max + 1) >> 9 less r_max: the
product is odd, so bytes b and 255 - b give opposite values, and z has mean exactly zero over all bytes.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentd.int8.tensor import LIMIT
from agentd.learn import philox

_ROUNDING = 1 << 32  # added to the tensor's number: the bits that round its update


@dataclass(frozen=True)
class Noise:
    """How large z is and how many entries it has. Raises ValueError outside r_max 1..63 and density 1..256."""

    r_max: int = 15
    density: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.r_max <= 63:
            raise ValueError(f"r_max {self.r_max} is not between 1 and 63")
        if not 1 <= self.density <= 256:
            raise ValueError(f"density {self.density} is not between 1 and 256")


def direction(seed: int, tensor: int, shape: tuple[int, ...], noise: Noise) -> Tensor:
    """z for the parameter with number `tensor`, int8 of `shape`. Entry i does not depend on the shape."""
    words = _bits(seed, tensor, math.prod(shape), "<u2")
    return torch.from_numpy(_table(noise).take(words)).reshape(shape)


def perturbed(weight: Tensor, z: Tensor, sign: int) -> Tensor:
    """clip(weight + sign z) in a new tensor. Never in place: clipping makes +z, -2z, +z irreversible near 127.

    NumPy, as in `descend`: for arrays this small torch spends longer on waking its threads than on the arithmetic.
    """
    combine = np.add if sign > 0 else np.subtract
    return torch.from_numpy(_clipped(combine(weight.numpy(), z.numpy(), dtype=np.int16)))


def descend(weight: Tensor, seed: int, tensor: int, noise: Noise, sign: int, bits: int) -> None:
    """weight <- clip(weight - sign z / 2**s), in place, with s so that r_max keeps `bits` magnitude bits.

    The rounding is stochastic, its bits counter-based too, so bits <= 0 is a step size below one mantissa.
    """
    if sign == 0:
        return
    n = weight.numel()
    words = _bits(seed, tensor, n, "<u2")
    shift = noise.r_max.bit_length() - bits
    if shift > 0:
        # Eight bits below the point, and a random byte that rounds them, downwards from one for a negative z.
        z = _fixed_point(noise, min(shift, 15)).take(words)  # |z| <= 63 * 128: a byte more fits 15 bits
        dice = _bits(seed, tensor + _ROUNDING, n, "u1").astype(np.int16)
        dice ^= (z >> 15) & 255  # 255 - dice where z < 0, so that floor(z + dice) mirrors the positive side
        z += dice
        z >>= 8
    else:
        z = _table(noise).take(words).astype(np.int16)
    own = weight.numpy().reshape(-1)
    combine = np.subtract if sign > 0 else np.add
    own[:] = _clipped(combine(own, z, dtype=np.int16))


def _clipped(values: NDArray[np.int16]) -> NDArray[np.int8]:
    np.minimum(values, LIMIT, out=values)
    np.maximum(values, -LIMIT, out=values)
    return values.astype(np.int8)


@lru_cache(maxsize=64)
def _fixed_point(noise: Noise, shift: int) -> NDArray[np.int16]:
    """z * 2**8 / 2**shift for each of the 65,536 words, magnitudes cut off: int16."""
    z = _table(noise).astype(np.int32)
    cut: NDArray[np.int16] = (np.sign(z) * ((np.abs(z) << 8) >> shift)).astype(np.int16)
    return cut


@lru_cache(maxsize=8)
def _table(noise: Noise) -> NDArray[np.int8]:
    """z for each of the 65,536 words: the low byte is the mask's, the high byte the value's."""
    byte = np.arange(256, dtype=np.int64)
    values = ((2 * byte + 1) * (2 * noise.r_max + 1) >> 9) - noise.r_max
    return (values[:, None] * (byte < noise.density)[None, :]).astype(np.int8).reshape(-1)


def _bits(seed: int, tensor: int, n: int, dtype: str) -> NDArray[Any]:
    """`n` entries of random bits."""
    size = np.dtype(dtype).itemsize
    return philox.words(seed, tensor, 0, -(-n * size // 8)).view(dtype)[:n]
