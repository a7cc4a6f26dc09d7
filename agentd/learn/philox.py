"""Counter-based random bits: any tensor of any step can be made again alone, in any order, on any machine.

Philox4x64-10 is the generator of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3"
(SC 2011). The key is (seed, tensor): the step's seed in the ledger, and the number of the array it is for. The counter
starts at 0; a count gives four 64-bit words. Words are little-endian and their lowest bit comes first on every machine:
the order is part of the ledger's meaning.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Bits that one count gives."""

_LIMIT = 1 << 64


def words(seed: int, tensor: int, start: int, n: int) -> NDArray[np.uint64]:
    """Words start .. start + n - 1 of the key (seed, tensor); `start` is a multiple of 4.

    Raises ValueError for a key that is not two unsigned 64-bit integers.
    """
    if not 0 <= seed < _LIMIT or not 0 <= tensor < _LIMIT:
        raise ValueError(f"seed {seed} and tensor {tensor} must be unsigned 64-bit integers")
    return _generator.at(seed, tensor, start // 4).random_raw(n).astype("<u8", copy=False)


def rademacher(seed: int, tensor: int, n: int) -> NDArray[np.float32]:
    """`n` independent signs, -1 or +1 with equal probability, as float32 of shape (n,). They take a bit each: 17 k of
    them some 30 µs, where Gaussian entries would take ten times that.

    Entry i is the same for every `n`. Raises ValueError when an argument is out of range.
    """
    if n < 0:
        raise ValueError(f"cannot make {n} signs")
    bits = np.unpackbits(words(seed, tensor, 0, -(-n // 64)).view(np.uint8), count=n, bitorder="little")
    signs = bits.astype(np.float32)
    signs *= 2.0
    signs -= 1.0
    return signs


class _Generator(threading.local):
    """One bit generator for each thread, put to a counter of a key. A new one would draw a seed from the system first,
    which takes longer than the bits of a small tensor."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state: Any = self._philox.state

    def at(self, seed: int, tensor: int, count: int) -> np.random.Philox:
        self._state["state"]["key"][:] = seed, tensor
        self._state["state"]["counter"][:] = count, 0, 0, 0
        self._philox.state = self._state
        return self._philox


_generator = _Generator()
