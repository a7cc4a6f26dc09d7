"""Low-rank changes beside frozen linear layers: y = W x + B A x (LoRA, Hu et al. 2021, equation 3, alpha / r within B).

A (r, in) begins random and B (out, r) zero. By BP the factors learn with AdamW (adamw.py), by zeroth-order steps with
`InPlace` on them: MeZO (LoRA) of Malladi et al. 2023. With `freeze_a` only B moves (LoRA-FA, Zhang et al. 2023): then
the change is linear in what is trained, which zeroth-order steps like, as perturbing A says nothing while B is zero.

What was learned can be added to the weights for good (`merge`), by arithmetic that is the same on every machine.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from agentd.learn.weights import rounding
from agentd.learn.weights.layers import Layer, layer_of
from agentd.learn.weights.replaced import replaced

_PIECE = 8 * rounding.BLOCK
_KEY = 1 << 49  # added to a parameter's number: dice apart from those of updates


class Change(Protocol):
    """A linear map beside a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) in fp32, of which it is the product B A."""


class LowRank(nn.Module):
    """alpha / r B A x. The factors are fp32.

    exact  so are the products, which zeroth-order steps need: their losses differ by little. Else they are of x's type,
           which in bf16 leaves half as much to keep for a backward
    """

    def __init__(
        self,
        base: Layer,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        *,
        freeze_a: bool = False,
        exact: bool = True,
    ) -> None:
        super().__init__()
        self.scale, self._exact = alpha / rank, exact
        device = base.weight.device
        a = (torch.randn(rank, base.n_in, generator=generator) / base.n_in**0.5).to(device)
        if freeze_a:
            self.register_buffer("lora_a", a)
        else:
            self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(base.n_out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        kind = self.lora_b.dtype if self._exact else x.dtype
        return self.scale * linear(linear(x.to(kind), self.lora_a.to(kind)), self.lora_b.to(kind))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_a.detach(), self.scale * self.lora_b.detach()


class Beside(nn.Module):
    """Changes beside the linear layers of a model, which itself is as it was whenever they are not attached.

    `make` gives a layer's change; every layer but the head has one. The parameters here are the changes' own. Raises
    ValueError when there is no such layer.
    """

    def __init__(self, model: nn.Module, make: Callable[[Layer, torch.Generator], nn.Module], seed: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self.changes = nn.ModuleList()
        self._places: list[nn.Module] = []
        head = _head(model)
        for name, module in model.named_modules():
            if module is not head and (layer := layer_of(module)) is not None:
                # From the seed and the layer's name, so that it depends on no other layer.
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                self.names.append(name)
                self.changes.append(make(layer, generator))
                self._places.append(module)
        if not self.names:
            raise ValueError("the model has no linear layer to put a low-rank change beside")

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, forwards of the model are those with the changes."""
        with replaced((place, _with(place, change)) for place, change in zip(self._places, self.changes, strict=True)):
            yield

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) by the layer's name; they share memory with what learns."""
        return {name: change.factors() for name, change in zip(self.names, self.changes, strict=True)}  # type: ignore[operator]


def beside(
    model: nn.Module, rank: int, alpha: float, seed: int, *, freeze_a: bool = False, exact: bool = True
) -> Beside:
    """LoRA beside every linear layer but the head."""

    def make(base: Layer, generator: torch.Generator) -> LowRank:
        return LowRank(base, rank, alpha, generator, freeze_a=freeze_a, exact=exact)

    return Beside(model, make, seed)


def _head(model: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states. Where it is tied, a change of it would be one of the embeddings."""
    find = getattr(model, "get_output_embeddings", None)
    found = None if find is None else find()
    return found if isinstance(found, nn.Module) else None


def _with(place: nn.Module, change: nn.Module) -> Callable[[Tensor], Tensor]:
    plain = type(place).forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = plain(place, x)
        more: Tensor = change(x)
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
    for start in range(0, flat.numel(), _PIECE):
        n = min(_PIECE, flat.numel() - start)
        first, end = start // width, -(-(start + n) // width)
        delta = torch.zeros(end - first, width, device=weight.device)
        product = torch.empty_like(delta)
        for column in range(len(a)):
            torch.mul(b[first:end, column : column + 1], a[column : column + 1], out=product)
            delta += product
        begin = start - first * width
        rounding.add(flat, start, delta.view(-1)[begin : begin + n], 0, _KEY + number)
