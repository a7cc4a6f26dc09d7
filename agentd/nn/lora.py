"""Low-rank adapters beside frozen linear layers: y = W x + B A x (LoRA, Hu et al. 2021, equation 3, alpha / r in B).

A (r, in) begins random and B (out, r) zero. By BP the factors learn with AdamW (adamw.py), by zeroth-order steps
with `InPlace` on them: MeZO (LoRA) of Malladi et al. 2023.

What was learned can be added to the weights for good (`merge`), by arithmetic that is the same on every machine.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from agentd.nn import stochastic_rounding
from agentd.nn.forward_patch import replaced
from agentd.nn.linear_layer import Layer, layer_of

_KEY = 1 << 49  # added to a parameter's number: dice apart from those of updates


class LowRank(nn.Module):
    """alpha / r B A x, for A (r, in) and B (out, r) in fp32.

    exact  so are the products, which zeroth-order steps need: their losses differ by little. Else they are of x's type,
           which in bf16 leaves half as much to keep for a backward
    """

    def __init__(self, a: Tensor, b: Tensor, alpha: float, *, exact: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self._exact = alpha / len(a), exact

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.b.dtype if self._exact else x.dtype
        return self.scale * linear(linear(x.to(dtype), self.a.to(dtype)), self.b.to(dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a.detach(), self.scale * self.b.detach()


def named_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for one layer, independent of other layers."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def start(rank: int, n_in: int, n_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A drawn from N(0, 1 / in), and B of zeros."""
    return torch.randn(rank, n_in, generator=generator) / n_in**0.5, torch.zeros(n_out, rank)


class AdapterSet(nn.Module):
    """Adapters beside the linear layers of a model, which itself is as it was whenever they are not attached.

    `make` gives a layer's adapter: a module from x (..., in) to (..., out) whose `factors` are A (r, in) and B (out, r)
    in fp32. Every layer but the head has one. The parameters here are the adapters' own. Raises ValueError when there
    is no such layer.
    """

    def __init__(self, model: nn.Module, make: Callable[[Layer, torch.Generator], nn.Module], seed: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self.adapters = nn.ModuleList()
        self._places: list[nn.Module] = []
        head = _head(model)
        for name, module in model.named_modules():
            if module is not head and (layer := layer_of(module)) is not None:
                self.names.append(name)
                self.adapters.append(make(layer, named_generator(seed, name)))
                self._places.append(module)
        if not self.names:
            raise ValueError("the model has no linear layer to put a low-rank adapter beside")

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, forwards of the model are those with the adapters."""
        with replaced(
            (place, _with(place, adapter)) for place, adapter in zip(self._places, self.adapters, strict=True)
        ):
            yield

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) by the layer's name; they share memory with what learns."""
        return {name: adapter.factors() for name, adapter in zip(self.names, self.adapters, strict=True)}  # type: ignore[operator]


def adapters(model: nn.Module, rank: int, alpha: float, seed: int, *, exact: bool = True) -> AdapterSet:
    """LoRA beside every linear layer but the head."""

    def make(base: Layer, generator: torch.Generator) -> LowRank:
        adapter = LowRank(*start(rank, base.n_in, base.n_out, generator), alpha, exact=exact)
        return adapter.to(base.weight.device)

    return AdapterSet(model, make, seed)


def _head(model: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states. Where it is tied, an adapter of it would be one of the embeddings."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return head if isinstance(head, nn.Module) else None


def _with(place: nn.Module, adapter: nn.Module) -> Callable[[Tensor], Tensor]:
    plain = type(place).forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = plain(place, x)
        more: Tensor = adapter(x)
        return y + more.to(y.dtype)

    return forward


@torch.no_grad()
def merge(weight: Tensor, a: Tensor, b: Tensor, number: int) -> None:
    """weight (out, in) += B A for good, for A (r, in) and B (out, r) in fp32; `number` keys the rounding of bf16.

    Products are rounded and added one rank after the other: a matrix product's order of summation differs between
    machines and numbers of threads, and a revision must be the same bytes on all of them.
    """
    if tuple(weight.shape) != (len(b), a.shape[1]) or len(a) != b.shape[1]:
        raise ValueError(f"factors {tuple(b.shape)} and {tuple(a.shape)} do not fit a weight {tuple(weight.shape)}")
    flat, width = weight.view(-1), weight.shape[1]
    for start in range(0, flat.numel(), stochastic_rounding.PIECE):
        n = min(stochastic_rounding.PIECE, flat.numel() - start)
        first, end = start // width, -(-(start + n) // width)
        delta = torch.zeros(end - first, width, device=weight.device)
        product = torch.empty_like(delta)
        for column in range(len(a)):
            torch.mul(b[first:end, column : column + 1], a[column : column + 1], out=product)
            delta += product
        begin = start - first * width
        stochastic_rounding.add(flat, start, delta.view(-1)[begin : begin + n], 0, _KEY + number)
