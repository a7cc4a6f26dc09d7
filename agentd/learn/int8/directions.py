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

from agentd.learn.int8.rounding import apply_update
from agentd.learn.int8.tensor import LIMIT

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
    """clip(weight + sign z) in a new tensor. Never in place: clipping makes +z, -2z, +z irreversible near 127."""
    moved = weight.to(torch.int16)
    moved += z if sign > 0 else -z  # |z| <= 63: no -128 to negate
    return moved.clamp_(-LIMIT, LIMIT).to(torch.int8)


def descend(weight: Tensor, seed: int, tensor: int, noise: Noise, sign: int, bits: int) -> None:
    """weight <- clip(weight - sign z / 2**s), in place, with s so that r_max keeps `bits` magnitude bits.

    The rounding is stochastic, its bits counter-based too, so bits <= 0 is a step size below one mantissa.
    """
    if sign == 0:
        return
    z = direction(seed, tensor, weight.shape, noise).to(torch.int16)
    shift = noise.r_max.bit_length() - bits
    if shift > 0:
        # Eight bits below the point, and a random byte to round them: 63 * 256 + 255 fits 15 bits. A shift of more than
        # 14 leaves nothing of any z.
        magnitude = z.abs()
        magnitude <<= 8
        magnitude >>= min(shift, 15)
        magnitude += torch.from_numpy(_bits(seed, tensor + _ROUNDING, weight.numel(), "u1")).reshape(weight.shape)
        magnitude >>= 8
        z = magnitude * z.sign()
    apply_update(weight, z if sign > 0 else -z)


@lru_cache(maxsize=8)
def _table(noise: Noise) -> NDArray[np.int8]:
    """z for each of the 65,536 words: the low byte is the mask's, the high byte the value's."""
    byte = np.arange(256, dtype=np.int64)
    values = ((2 * byte + 1) * (2 * noise.r_max + 1) >> 9) - noise.r_max
    return (values[:, None] * (byte < noise.density)[None, :]).astype(np.int8).reshape(-1)


def _bits(seed: int, tensor: int, n: int, dtype: str) -> NDArray[Any]:
    """`n` entries of random bits, little-endian on every machine: the order is part of the ledger's meaning."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit integer")
    philox = np.random.Philox(key=np.array([seed, tensor], dtype=np.uint64))
    size = np.dtype(dtype).itemsize
    words = philox.random_raw(-(-n * size // 8)).astype("<u8", copy=False)
    return words.view(dtype)[:n]
