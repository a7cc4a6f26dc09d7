"""Bytes that a training step needs: the model that reproduces the paper's ranges (Sugiura and Matsutani, 2025).

    M_ZO        = |theta| + B sum(outputs of every convolution, activation, pool and linear layer)
    M_ElasticZO = M_ZO + sum over BP layers |gradient| + B |error at the output|
    M_BP        = 2 |theta| + 2 B sum(outputs)

fp32 counts 4 bytes each; int8 counts 1, and 4 more per convolution and linear output for its accumulator. It supposes
that every layer has a buffer of its own, as a static arena on a microcontroller; this
software frees a forward-only layer's buffers behind it, and in int8 BP holds patches and 64-bit sums that are not
counted here (tools/bench/paper/int8.py measures both).
"""

import math

from agentd.int8.architecture import Architecture, Conv, Flatten, Linear


def outputs(architecture: Architecture) -> int:
    """Outputs of all layers for one example. Flattening only renames."""
    shapes = architecture.shapes()[1:]
    return sum(
        math.prod(shape)
        for layer, shape in zip(architecture.layers, shapes, strict=True)
        if not isinstance(layer, Flatten)
    )


def accumulators(architecture: Architecture) -> int:
    """Outputs that are sums of products, for one example."""
    shapes = architecture.shapes()[1:]
    return sum(
        math.prod(shape)
        for layer, shape in zip(architecture.layers, shapes, strict=True)
        if isinstance(layer, (Conv, Linear))
    )


def step_bytes(architecture: Architecture, batch: int, bp_layers: int, *, int8: bool) -> int:
    """Bytes of a training step with the last `bp_layers` layers by BP."""
    width = 1 if int8 else 4
    size = width * architecture.size
    held = batch * (width * outputs(architecture) + (4 * accumulators(architecture) if int8 else 0))
    cutoff = architecture.cutoff(bp_layers)
    if bp_layers == len(architecture.trained_layers()):
        return 2 * size + held + batch * width * outputs(architecture)
    if bp_layers == 0:
        return size + held
    gradients = sum(math.prod(p.shape) for p in architecture.parameters() if p.layer >= cutoff)
    return size + held + width * (gradients + batch * architecture.classes)
