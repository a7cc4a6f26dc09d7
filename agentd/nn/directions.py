"""The direction z of a zeroth-order step, piece by piece: entry i of tensor t of the step with seed s is a function of
(s, t, i) alone, the same on every machine, device and number of threads.

Rademacher entries are the bits of Philox4x64-10 in the order of `learn.philox.rademacher`. Gaussian entries are the
65,536 equally probable quantiles of the normal distribution, scaled to unit variance and rounded to multiples of 2^-12,
so that no machine's logarithm takes part; 16 bits of Philox choose one. Both have mean 0 and variance 1.
"""

import math
import statistics
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentd.learn.philox import BLOCK, words

ROOM = 512
"""What a scratch has beyond the entries asked for: pieces are made from where random words begin to where they end."""

_BITS = {"rademacher": 1, "gaussian": 16}  # of a random word that make one entry
_GRID = 1 << 12


class Direction:
    """Makes pieces of z, whose entries have one of `learn.update_rule.DISTRIBUTIONS`."""

    def __init__(self, distribution: str) -> None:
        self.distribution = distribution
        self._bits = _BITS[distribution]
        self._held: tuple[int, dict[int, NDArray[np.uint64]]] = (0, {})

    def hold(self, seed: int, sizes: Mapping[int, int]) -> None:
        """Keeps the random words of one direction, which both signs and the update need: a bit for every entry, by
        tensor number and number of entries. Only where a bit is all they take; in place of what was held before."""
        if self._bits == 1 and not (self._held[0] == seed and self._held[1].keys() == sizes.keys()):
            self._held = (seed, {tensor: words(seed, tensor, 0, -(-n // 64)) for tensor, n in sizes.items()})

    def release(self) -> None:
        """Lets go of what `hold` keeps."""
        self._held = (0, {})

    def piece(
        self,
        seed: int,
        tensor: int,
        start: int,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
        scale: float = 1.0,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """scale * z[start : start + n] of shape (n,): a new tensor, or a part of `scratch`.

        `scratch` is flat, of `dtype`, and has room for n + ROOM entries; only the CPU uses it. Memory that was
        just used costs no page faults, which for pieces of some megabytes is half the time.

        The product is rounded once, to `dtype`, before anything is added to it: a fused multiplication and addition,
        which some processors have and some have not, would round differently.
        """
        begin = start * self._bits // BLOCK * BLOCK // self._bits
        raw = self._words(seed, tensor, begin * self._bits // 64, -(-(start - begin + n) * self._bits // 64))
        codes = raw.view(np.uint8 if self._bits == 1 else np.dtype("<u2"))
        entries = self._decode(codes, dtype, device, scale, scratch)
        return entries[start - begin : start - begin + n]

    def rows(
        self, seed: int, tensor: int, rows: Tensor, width: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """z of the given rows of a matrix with `width` columns: (len(rows), width)."""
        indices = rows.tolist()
        if self._bits == 1 and width % 8 == 0 and indices:
            # All bits up to the last row cost less than to put the generator to each row.
            end = (max(indices) + 1) * width
            codes = self._words(seed, tensor, 0, -(-end // 64)).view(np.uint8)[: end // 8].reshape(-1, width // 8)
            return self._decode(codes[indices].reshape(-1), dtype, device, 1.0).view(-1, width)
        parts = [self.piece(seed, tensor, row * width, width, dtype, device) for row in indices]
        return torch.stack(parts) if parts else torch.empty(0, width, dtype=dtype, device=device)

    def _words(self, seed: int, tensor: int, first: int, n: int) -> NDArray[np.uint64]:
        held = self._held[1].get(tensor) if self._held[0] == seed else None
        return words(seed, tensor, first, n) if held is None else held[first : first + n]

    def _decode(
        self, codes: NDArray[Any], dtype: torch.dtype, device: torch.device, scale: float, scratch: Tensor | None = None
    ) -> Tensor:
        table = _table(self.distribution, dtype, scale)
        width = table.shape[1]
        if device.type != "cpu":
            index = torch.from_numpy(codes.astype(np.int32)).to(device)
            return table.to(device).index_select(0, index).view(-1)
        # NumPy copies what stands for a byte with one instruction or two; torch loops over its numbers.
        entries = torch.empty(len(codes) * width, dtype=dtype) if scratch is None else scratch[: len(codes) * width]
        np.take(_as_entries(table.view(-1), width), codes, mode="wrap", out=_as_entries(entries, width))
        return entries


def _as_entries(flat: Tensor, width: int) -> NDArray[Any]:
    """The same memory, `width` numbers to an entry."""
    return flat.view(torch.uint8).numpy().view(f"V{width * flat.element_size()}")


@lru_cache(maxsize=16)
def _table(distribution: str, dtype: torch.dtype, scale: float) -> Tensor:
    """What a code stands for: (256, 8) signs per byte, lowest bit first, or (65536, 1) quantiles; times `scale`."""
    if distribution == "rademacher":
        bits = np.arange(256)[:, None] >> np.arange(8) & 1
        values = (2.0 * bits - 1.0).astype(np.float32)
    else:
        values = _quantiles()[:, None]
    return (torch.from_numpy(values) * float(scale)).to(dtype).contiguous()


@lru_cache(maxsize=1)
def _quantiles() -> NDArray[np.float32]:
    """65,536 numbers with mean exactly 0 and variance 1 (to 2^-12)."""
    half = 1 << 15
    normal = statistics.NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]
    deviation = math.sqrt(math.fsum(value * value for value in upper) / half)
    positive = np.array([round(value / deviation * _GRID) / _GRID for value in upper], np.float32)
    return np.concatenate([positive, -positive])
