"""Layers that multiply by a matrix, of any class, and whichever way round the matrix lies."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class Layer:
    """y (..., n_out) = W x (..., n_in), with a bias or not. The weight is W (out, in); `transposed`, it is W^T."""

    weight: Tensor
    n_in: int
    n_out: int
    transposed: bool = False

    def as_stored(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Of a change B A of W, the factors in the order in which their product has the weight's shape."""
        return (b.T.contiguous(), a.T.contiguous()) if self.transposed else (a, b)


def layer_of(module: nn.Module) -> Layer | None:
    """None for a module that does anything else with its parameters.

    transformers' Conv1D (the GPT-2 family's) has the matrix transposed. A subclass of nn.Linear is tried out with a row
    of its own, as some are routers that return more than a product.
    """
    if isinstance(module, nn.Linear):
        if type(module) is nn.Linear or _is_plain(module):
            return Layer(module.weight, module.in_features, module.out_features)
    elif {"nx", "nf"} <= vars(module).keys():
        weight, sizes = module._parameters.get("weight"), (vars(module)["nx"], vars(module)["nf"])
        if weight is not None and tuple(weight.shape) == sizes:
            return Layer(weight, *sizes, transposed=True)
    return None


@torch.no_grad()
def _is_plain(module: nn.Linear) -> bool:
    weight = module.weight
    row = torch.linspace(-1, 1, module.in_features, device=weight.device, dtype=weight.dtype)[None, None]
    product = linear(row, weight, module.bias)
    try:
        output = type(module).forward(module, row)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return isinstance(output, Tensor) and output.shape == product.shape and torch.allclose(output, product, 1e-2, 1e-2)
