"""Products of a few rows in float32. Before it multiplies more than one, the CPU's library rearranges the whole matrix,
which takes longer than to multiply it; not where the matrix comes first and the few rows, transposed, second."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from agentd.nn.forward_patch import replaced

MOST = 16  # rows, from where it makes no difference


def turned(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it the linear layers of a module multiply that way."""
    return replaced((layer, partial(_product, layer)) for layer in _linear(module))


def _linear(module: nn.Module) -> Iterator[nn.Linear]:
    return (each for each in module.modules() if type(each) is nn.Linear)


def _product(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    rows = torch.mm(layer.weight, x.reshape(-1, layer.in_features).T).T.contiguous()
    if layer.bias is not None:
        rows += layer.bias
    return rows.view(*x.shape[:-1], layer.out_features)
