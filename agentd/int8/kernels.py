"""int8 x int8 -> int32: matrix products and convolutions, exact.

`torch._int_mm` uses the CPU's int8 dot products where there are any (measured on two AVX512-VNNI cores, 256x784 by
784x120: 0.036 ms; the same in torch's int32 1.05 ms, in NumPy's 14 ms, in fp32 BLAS 0.25 ms). Some CPUs' int8 products
saturate pairs of terms at 16 bits, so it is tried on the worst case first, and int32 is used where it is not exact.

A convolution gathers patches and multiplies. A patch covers a tile of t x t outputs, (t + k - 1)^2 inputs instead of
t^2 k^2: the copying, which is most of the time, shrinks 6-fold for LeNet-5's first layer; the weights are spread over
the tile with zeros between them. Activations are laid out (B, H, W, C).
"""

from functools import lru_cache

import torch
from torch import Tensor

from agentd.int8.window import MAX_TERMS, Window

_PATCH_BYTES = 1 << 18  # patches made at a time: they stay in cache, and memory does not grow with the batch
_MAX_PATCH = 256


@lru_cache(maxsize=1)
def int8_products_are_exact() -> bool:
    """Whether torch._int_mm gives the sums it should on this machine, largest magnitudes included."""
    for m, k, n in ((64, 1024, 32), (33, 25, 6), (5, 3, 64), (96, 4096, 16)):
        full = torch.full((m, k), 127, dtype=torch.int8)
        mixed = torch.arange(m * k).mul_(7919).remainder_(255).sub_(127).to(torch.int8).reshape(m, k)
        for left in (full, -full, mixed):
            for right in (full[:1, :], -full[:1, :], mixed[:1, :]):
                b = right.expand(n, k).contiguous().t()
                try:
                    product = torch._int_mm(left, b)
                except RuntimeError:
                    return False
                if not torch.equal(product.to(torch.int64), left.to(torch.int64) @ b.to(torch.int64)):
                    return False
    return True


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b for int8 (M, K) and (K, N), K <= MAX_TERMS: int32 (M, N)."""
    if int8_products_are_exact():
        return torch._int_mm(a, b) if out is None else torch._int_mm(a, b, out=out)
    product = a.to(torch.int32) @ b.to(torch.int32)
    return product if out is None else out.copy_(product)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b for int8 (M, K) and (M, N) and any M: (K, N), int32 up to MAX_TERMS terms and int64 beyond. The sums over
    examples behind weight gradients."""
    if a.shape[0] <= MAX_TERMS:
        return matmul(a.t().contiguous(), b)
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.int64)
    for start in range(0, a.shape[0], MAX_TERMS):
        total += matmul(a[start : start + MAX_TERMS].t().contiguous(), b[start : start + MAX_TERMS])
    return total


def tile_size(channels: int, height: int, width: int, window: Window) -> int:
    """How many outputs, in each direction, share a patch: a divisor of both output sides."""
    for tile in (4, 2):
        side = (tile - 1) * window.stride + window.kernel
        if height % tile == 0 and width % tile == 0 and side * side * channels <= _MAX_PATCH:
            return tile
    return 1


def convolve(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Accumulators of a convolution in tiles: int32 (B, H/t, W/t, t, t, O) of int8 (B, H, W, C) and (O, C, k, k)."""
    x = _padded(x, window.padding)
    batch, rows, columns, tile = _tiles(x, window)
    spread = _spread(weight, window.stride, tile)
    accumulator = torch.empty(batch, rows, columns, tile, tile, weight.shape[0], dtype=torch.int32)
    flat = accumulator.view(batch, -1, spread.shape[1])
    for part in _parts(batch, rows * columns * spread.shape[0]):
        patches = _patches(x[part], window, tile)
        matmul(patches, spread, flat[part].view(-1, spread.shape[1]))
    return accumulator


def weight_gradient(x: Tensor, error: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Sum over examples and positions of error times input: int64 of the weight's shape (O, C, k, k)."""
    x = _padded(x, window.padding)
    batch, rows, columns, tile = _tiles(x, window)
    index = _index(*weight.shape[:3], window.stride, tile)
    by_tile = error.view(batch, rows, tile, columns, tile, -1).permute(0, 1, 3, 2, 4, 5)
    total = torch.zeros(index.shape, dtype=torch.int64)
    for part in _parts(batch, rows * columns * index.shape[0]):
        total += outer(_patches(x[part], window, tile), by_tile[part].reshape(-1, index.shape[1]))
    folded = torch.zeros(weight.numel() + 1, dtype=torch.int64)
    folded.index_add_(0, index.flatten(), total.flatten())
    return folded[:-1].view(weight.shape)


def input_gradient(error: Tensor, weight: Tensor, window: Window, height: int, width: int) -> Tensor:
    """The error at a convolution's input, int32 (B, height, width, C): a convolution with the flipped kernel."""
    reach = 2 * window.padding - window.kernel + 1
    if window.stride > 1 or error.shape[1:3] != (height + reach, width + reach):
        spaced = error.new_zeros(error.shape[0], height + reach, width + reach, error.shape[3])
        step = window.stride
        spaced[:, : step * error.shape[1] : step, : step * error.shape[2] : step] = error
        error = spaced
    flipped = weight.transpose(0, 1).flip(2, 3)
    back = Window(window.kernel, 1, window.kernel - 1 - window.padding)
    return untile(convolve(error, flipped, back))


def untile(tiles: Tensor) -> Tensor:
    """(B, H/t, W/t, t, t, O) as (B, H, W, O)."""
    batch, rows, columns, tile, _, channels = tiles.shape
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows * tile, columns * tile, channels)


def _padded(x: Tensor, padding: int) -> Tensor:
    if not padding:
        return x.contiguous()
    batch, height, width, channels = x.shape
    padded = x.new_zeros(batch, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = x  # functional.pad's fill value is a float
    return padded


def _tiles(padded: Tensor, window: Window) -> tuple[int, int, int, int]:
    batch, height, width, channels = padded.shape
    height, width = Window(window.kernel, window.stride, 0).output(height, width)
    tile = tile_size(channels, height, width, window)
    return batch, height // tile, width // tile, tile


def _parts(batch: int, bytes_per_example: int) -> list[slice]:
    size = max(1, _PATCH_BYTES // bytes_per_example)
    return [slice(start, start + size) for start in range(0, batch, size)]


def _patches(padded: Tensor, window: Window, tile: int) -> Tensor:
    batch, rows, columns, tile = _tiles(padded, window)
    side = (tile - 1) * window.stride + window.kernel
    by_image, by_row, by_column, _ = padded.stride()
    step = tile * window.stride
    channels = padded.shape[3]
    return padded.as_strided(
        (batch, rows, columns, side, side * channels), (by_image, by_row * step, by_column * step, by_row, 1)
    ).reshape(batch * rows * columns, side * side * channels)


def _spread(weight: Tensor, stride: int, tile: int) -> Tensor:
    """The weights for a tile of outputs: (side * side * C, t * t * O), zero where an input is outside a kernel."""
    index = _index(*weight.shape[:3], stride, tile)
    return torch.cat((weight.reshape(-1), weight.new_zeros(1)))[index]


@lru_cache(maxsize=64)
def _index(out: int, channels: int, kernel: int, stride: int, tile: int) -> Tensor:
    """Where each entry of `_spread` comes from in the flat weight; the entry after the last stands for zero."""
    side = (tile - 1) * stride + kernel
    outside = out * channels * kernel * kernel
    index = torch.full((side, side, channels, tile, tile, out), outside, dtype=torch.int64)
    source = torch.arange(outside).reshape(out, channels, kernel, kernel).permute(2, 3, 1, 0)
    for row in range(tile):
        for column in range(tile):
            y, x = row * stride, column * stride
            index[y : y + kernel, x : x + kernel, :, row, column] = source
    return index.reshape(side * side * channels, tile * tile * out)
