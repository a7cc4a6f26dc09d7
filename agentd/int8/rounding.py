"""Shifts that turn wide accumulators into mantissas and updates. Integers only; nothing here can wrap.

Shifting a negative number right floors it, so rounding is by magnitude. `bit_length` and not ceil(log2): at 128 the
latter would keep all eight bits, and 128 wraps in int8.
"""

import torch
from torch import Tensor

from agentd.int8.tensor import LIMIT, Int8Tensor

BITS = 7  # magnitude bits of a mantissa
_PIECE = 1 << 14  # entries updated at a time
_ROUNDED = 1 << 18  # accumulators rounded at a time


def largest(values: Tensor) -> int:
    """max |values|, as a Python integer."""
    low, high = torch.aminmax(values)
    return max(int(high), -int(low))


def shift_nearest(values: Tensor, shift: int) -> Tensor:
    """values / 2**shift, rounded to the nearest, halves away from zero; overwrites `values`.

    |values| + 2**(shift - 1) must fit the dtype (window.MAX_TERMS sees to it).
    """
    if shift <= 0:
        return values
    width = 8 * values.element_size() - 1
    # For a = -m: floor((-m - 1 + half) / 2**s) = -floor((m + half) / 2**s), so adding the sign bit rounds by magnitude.
    sign = values >> width
    values += sign
    values += 1 << (shift - 1)
    values >>= shift
    return values


def shift_stochastic(values: Tensor, shift: int) -> Tensor:
    """values / 2**shift, rounded up in magnitude with a probability near the fraction cut off (NITI, section 3.3).

    Pseudo-stochastic: the upper half of the discarded bits is the probability and the lower half the random number, so
    it is deterministic and needs no generator. At a shift of 1 there is no lower half, and it rounds halves up.
    """
    if shift <= 0:
        return values
    magnitude = values.abs()
    fraction = magnitude & ((1 << shift) - 1)
    lower = shift // 2
    dice = fraction & ((1 << lower) - 1)
    if shift % 2:
        dice <<= 1
    magnitude >>= shift
    magnitude += (fraction >> lower) > dice
    return magnitude * values.sign()


def requantise(accumulator: Tensor, exponent: int, *, top: int | None = None, rectify: bool = False) -> Int8Tensor:
    """Accumulators (integers of any width, times 2**exponent) as mantissas; overwrites `accumulator`.

    The shift is the least that fits max |accumulator| (`top`, where it is known) into 7 bits. `rectify` applies a ReLU
    on the way, which gives the same as a ReLU afterwards. Goes in pieces, as a temporary of a large layer's 32-bit
    accumulators would take more memory than fp32 does.
    """
    shift = max(0, (largest(accumulator) if top is None else top).bit_length() - BITS)
    mantissa = torch.empty(accumulator.shape, dtype=torch.int8)
    flat, target = accumulator.reshape(-1), mantissa.view(-1)
    for start in range(0, flat.numel(), _ROUNDED):
        piece = flat[start : start + _ROUNDED]
        if not rectify:
            piece = shift_nearest(piece, shift)
        else:
            piece.clamp_(min=0)
            if shift:
                piece += 1 << (shift - 1)
                piece >>= shift
        target[start : start + _ROUNDED] = piece.clamp_(-LIMIT, LIMIT)
    return Int8Tensor(mantissa, exponent + shift)


def descend(weight: Tensor, gradient: Tensor, bits: int) -> None:
    """weight <- clip(weight - gradient cut to `bits` magnitude bits), in place: NITI's update, bits its learning rate.

    The cut rounds pseudo-stochastically. Any integer `bits`: at 0 and below, the largest entry moves its weight by one
    with probability about 2**bits. Goes in pieces that stay in cache: the temporaries of a whole layer would be several
    times the layer.
    """
    shift = min(62, largest(gradient).bit_length() - bits)  # far more than cuts everything off
    flat, update = weight.view(-1), gradient.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = slice(start, start + _PIECE)
        cut = shift_stochastic(update[piece].to(torch.int64), shift).clamp_(-2 * LIMIT, 2 * LIMIT).to(torch.int16)
        flat[piece] = (flat[piece] - cut).clamp_(-LIMIT, LIMIT)
