"""theta <- theta + delta in fp32 arithmetic for weights of any width, reproducible bit for bit.

bf16 keeps 8 bits of a number, and an update is often smaller than the last of them: rounded to nearest it would be lost
every time. Stochastic rounding adds 16 random bits below the last one kept and cuts off, so that the mean over the dice
is the fp32 sum. The dice are counter-based: a pool of 2^20 from the seed alone, of which every block of 65,536 entries
of a tensor takes a stretch that begins where (seed, tensor, block) says. Two entries share a die with a probability of
2^-20, which no sum of rounding errors notices, and fresh bits would take longer than all the rest.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from agentd.learn.philox import words

BLOCK = 1 << 16
"""Entries that share a stretch of dice. Part of the ledger's meaning."""

PIECE = 8 * BLOCK  # weights that are updated at a time

_BLOCKS = 1 << 32  # added to the tensor's number: the key of its blocks' stretches
_POOL = 1 << 33  # the key of the dice that all blocks share
_DICE = 1 << 20


def add(weight: Tensor, start: int, delta: Tensor, seed: int, tensor: int) -> None:
    """weight[start : start + n] += delta, for a flat fp32 or bf16 `weight` and an fp32 `delta` of shape (n,), which is
    overwritten.

    `start` is a multiple of BLOCK for bf16. Raises ValueError for other types of weights.
    """
    piece = weight[start : start + len(delta)]
    if weight.dtype == torch.float32:
        piece += delta
        return
    check(weight.dtype)
    if start % BLOCK:
        raise ValueError(f"a piece of bf16 weights begins at a multiple of {BLOCK}, not at {start}")
    delta += piece.float()
    bits = delta.view(torch.int32)
    pool = _pool(seed, weight.device)
    for i, begin in enumerate(_stretches(seed, tensor, start // BLOCK, -(-len(delta) // BLOCK))):
        block = bits[i * BLOCK : (i + 1) * BLOCK]
        block += pool[begin : begin + len(block)]
    bits &= -BLOCK
    piece.copy_(delta)


def check(dtype: torch.dtype) -> None:
    """Raises ValueError for weights of a type that cannot be trained in place."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weights of type {dtype} cannot be trained in place: float32 and bfloat16 can")


@lru_cache(maxsize=2)
def _pool(seed: int, device: torch.device) -> Tensor:
    """int32 in [0, 65536)."""
    dice = words(seed, _POOL, 0, (_DICE + BLOCK) // 4).view("<u2")
    return torch.from_numpy(dice.astype(np.int32)).to(device)


def _stretches(seed: int, tensor: int, first: int, n: int) -> list[int]:
    """Where the dice of blocks first .. first + n - 1 begin in the pool."""
    begin = first // 8 * 8  # what one count of Philox gives
    numbers = words(seed, tensor + _BLOCKS, begin // 2, -(-(first - begin + n) // 2)).view("<u4") % _DICE
    begins: list[int] = numbers[first - begin : first - begin + n].tolist()
    return begins
