"""One layer's forward pass, its error at the input, and its gradients, in integers.

Images are laid out (B, H, W, C) in here. An error tensor is rescaled like an activation (NITI, section 3.2); a
gradient is the plain integer sum, since only its leading bits will be used.
"""

import torch
from torch import Tensor

from agentd.int8 import kernels
from agentd.int8.architecture import Conv, Flatten, GlobalMaxPool, Layer, Linear, MaxPool, ReLU
from agentd.int8.rounding import largest, requantise, shift_nearest
from agentd.int8.tensor import Int8Tensor

Weights = list[Int8Tensor]  # of one layer: none, the weight, or the weight and the bias

_MAX_BIAS = 1 << 30


def forward(layer: Layer, weights: Weights, x: Int8Tensor) -> Int8Tensor:
    """The layer's output for a batch. ReLU and pooling keep the exponent."""
    if isinstance(layer, Conv):
        return conv(layer, weights, x)
    if isinstance(layer, ReLU):
        return Int8Tensor(x.mantissa.clamp(min=0), x.exponent)
    if isinstance(layer, MaxPool):
        return Int8Tensor(_pooled(x.mantissa, layer.size), x.exponent)
    if isinstance(layer, GlobalMaxPool):
        return Int8Tensor(x.mantissa.flatten(1, -2).amax(1), x.exponent)
    if isinstance(layer, Flatten):
        flat = x.mantissa.movedim(-1, 1) if x.mantissa.dim() == 4 else x.mantissa
        return Int8Tensor(flat.reshape(len(flat), -1), x.exponent)
    if isinstance(layer, Linear):
        return linear(weights, x)
    # Batch normalisation, folded to its affine map.
    accumulator = x.mantissa.to(torch.int32)
    accumulator *= weights[0].mantissa
    exponent = x.exponent + weights[0].exponent
    _add_bias(accumulator, weights, exponent)
    return requantise(accumulator, exponent)


def linear(weights: Weights, x: Int8Tensor, *, rectify: bool = False) -> Int8Tensor:
    """(..., K) to (..., O); `rectify` applies the ReLU that follows on the way."""
    flat = x.mantissa.reshape(-1, x.shape[-1])
    accumulator = kernels.matmul(flat, weights[0].mantissa.t())
    exponent = x.exponent + weights[0].exponent
    _add_bias(accumulator, weights, exponent)
    y = requantise(accumulator, exponent, rectify=rectify)
    return Int8Tensor(y.mantissa.view(*x.shape[:-1], -1), y.exponent)


def conv(layer: Conv, weights: Weights, x: Int8Tensor, *, rectify: bool = False, pool: int = 1) -> Int8Tensor:
    """(B, H, W, C) to (B, H', W', O). `rectify` and `pool` apply what follows on the way.

    Rescaling is monotone, so pooling before it gives the same mantissas; the shift is that of all accumulators.
    `pool` must divide the tile (`can_pool`).
    """
    tiles = kernels.convolve(x.mantissa, weights[0].mantissa, layer.window)
    exponent = x.exponent + weights[0].exponent
    _add_bias(tiles, weights, exponent)
    top = largest(tiles)
    if pool > 1:
        pooled = _pooled(tiles.flatten(0, 2), pool)
        tiles = pooled.view(*tiles.shape[:3], *pooled.shape[1:])
    y = requantise(tiles, exponent, top=top, rectify=rectify)
    return Int8Tensor(kernels.untile(y.mantissa), y.exponent)


def can_pool(layer: Conv, shape: tuple[int, ...], size: int) -> bool:
    """Whether pooling squares lie within the convolution's tiles; `shape` is (C, H, W) of its input."""
    tile = kernels.tile_size(shape[0], *layer.window.output(*shape[1:]), layer.window)
    return tile % size == 0


def backward(layer: Layer, weights: Weights, x: Int8Tensor, y: Int8Tensor, error: Int8Tensor) -> Int8Tensor:
    """The error at the layer's input, from that at its output; x and y are its input and output."""
    e = error.mantissa
    if isinstance(layer, ReLU):
        return Int8Tensor(e * (y.mantissa > 0), error.exponent)
    if isinstance(layer, MaxPool):
        return Int8Tensor(_unpooled(x.mantissa, y.mantissa, e, layer.size), error.exponent)
    if isinstance(layer, GlobalMaxPool):
        flat = x.mantissa.flatten(1, -2)
        back = torch.zeros_like(flat).scatter_(1, flat.argmax(1, keepdim=True), e.unsqueeze(1))
        return Int8Tensor(back.view(x.shape), error.exponent)
    if isinstance(layer, Flatten):
        if x.mantissa.dim() == 4:
            return Int8Tensor(e.view(x.shape[0], x.shape[3], *x.shape[1:3]).movedim(1, -1), error.exponent)
        return Int8Tensor(e.view(x.shape), error.exponent)
    weight = weights[0]
    if isinstance(layer, Conv):
        accumulator = kernels.input_gradient(e, weight.mantissa, layer.window, *x.shape[1:3])
    elif isinstance(layer, Linear):
        accumulator = kernels.matmul(e.reshape(-1, e.shape[-1]), weight.mantissa).view(x.shape)
    else:
        accumulator = e.to(torch.int32) * weight.mantissa
    return requantise(accumulator, error.exponent + weight.exponent)


def gradients(layer: Layer, weights: Weights, x: Int8Tensor, error: Int8Tensor) -> list[Tensor]:
    """The gradient of each of the layer's parameters, summed over the batch, int32 or int64; each at an exponent of its
    own."""
    e = error.mantissa
    flat = e.reshape(-1, e.shape[-1])
    if isinstance(layer, Conv):
        weight = kernels.weight_gradient(x.mantissa, e, weights[0].mantissa, layer.window)
    elif isinstance(layer, Linear):
        weight = kernels.outer(flat, x.mantissa.reshape(-1, x.shape[-1]))
    else:
        products = flat.to(torch.int16) * x.mantissa.reshape(flat.shape)
        weight = products.sum(0, dtype=torch.int64)
    return [weight] if len(weights) == 1 else [weight, flat.sum(0, dtype=torch.int64)]


def _add_bias(accumulator: Tensor, weights: Weights, exponent: int) -> None:
    """Adds the bias, shifted to the accumulators' exponent; beyond 2**30 it is clipped, so the sum stays in int32."""
    if len(weights) == 1:
        return
    bias, shift = weights[1].mantissa.to(torch.int64), weights[1].exponent - exponent
    bias = bias << min(shift, 32) if shift >= 0 else shift_nearest(bias, min(-shift, 16))
    accumulator += bias.clamp_(-_MAX_BIAS, _MAX_BIAS).to(torch.int32)


def _squares(x: Tensor, size: int) -> list[Tensor]:
    """The size**2 entries of each pooling square of (B, H, W, C), each as (B, H // size, W // size, C)."""
    height, width = x.shape[1] // size * size, x.shape[2] // size * size
    return [x[:, row:height:size, column:width:size] for row in range(size) for column in range(size)]


def _pooled(x: Tensor, size: int) -> Tensor:
    if size == 1:
        return x
    # Rows first: whole rows lie together.
    height, width = x.shape[1] // size * size, x.shape[2] // size * size
    rows = x[:, 0:height:size]
    for row in range(1, size):
        rows = torch.maximum(rows, x[:, row:height:size])
    pooled = rows[:, :, 0:width:size]
    for column in range(1, size):
        pooled = torch.maximum(pooled, rows[:, :, column:width:size])
    return pooled


def _unpooled(x: Tensor, y: Tensor, error: Tensor, size: int) -> Tensor:
    """The error goes to the first maximum of each square."""
    back = torch.zeros_like(x)
    free = torch.ones_like(y, dtype=torch.bool)
    for source, target in zip(_squares(x, size), _squares(back, size), strict=True):
        hit = (source == y) & free
        target.copy_(error * hit)
        free &= ~hit
    return back
