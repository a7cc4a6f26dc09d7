"""LoRA matrices on the blocks' linear layers, and the GGUF adapter files llama.cpp loads them from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from agentd.errors import TrainerFailed
from agentd.formats import adapter_gguf
from agentd.nn.blocks import Blocks, Unsupported
from agentd.nn.linear_ops import adapted
from agentd.nn.lora import LowRank, named_generator, start
from agentd.nn.matrix import weight_of

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (rank, in) and B (out, rank); the layer's weight becomes W + alpha / rank * B A."""


class LoRALinear(LowRank):
    """A frozen linear layer and its trainable low-rank update (Hu et al. 2021, arXiv 2106.09685) as one operation."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
        super().__init__(a, b, alpha)
        self.base = base  # its weight comes and goes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return adapted(x, weight_of(self.base), self.base.bias, self.a, self.b, self.scale)


@dataclass(frozen=True)
class Adapter:
    """A GGUF adapter file: alpha, and a pair of matrices per tensor of the model."""

    alpha: float
    pairs: dict[str, Pair]


def attach(blocks: Blocks, rank: int, alpha: float, seed: int, parent: Adapter | None) -> dict[str, LoRALinear]:
    """Puts LoRA on every linear layer of the range, by GGUF tensor name; starts from `parent` where it has the tensor.

    They start from the seed and the tensor's name, so a block starts the same in every range.
    """
    layers: dict[str, LoRALinear] = {}
    if not blocks.linears:
        raise Unsupported(blocks.file.path, "none of its matrices can be trained")
    inherited = (
        {name: pair for name, pair in parent.pairs.items() if block_of(name) in range(blocks.first, blocks.end)}
        if parent
        else {}
    )
    if unknown := sorted(set(inherited) - set(blocks.linears)):
        raise TrainerFailed(f"the parent's adapter changes {unknown[0]}, which cannot be trained here")
    for name, place in blocks.linears.items():
        base = getattr(*place)
        n_out, n_in = base.weight.shape
        a, b = start(rank, n_in, n_out, named_generator(seed, name))
        if name in inherited:
            a, b = _continue(name, inherited[name], parent.alpha if parent else alpha, a, b, alpha)
        layers[name] = LoRALinear(base, a, b, alpha)
        blocks.set(place, layers[name])
    return layers


def adopt(blocks: Blocks, adapter: Adapter) -> None:
    """Puts an adapter's matrices on the blocks of the range that it changes, as they are; nothing is to be trained."""
    for name, (a, b) in adapter.pairs.items():
        if block_of(name) not in range(blocks.first, blocks.end):
            continue
        if name not in blocks.linears:
            raise TrainerFailed(f"the parent's adapter changes {name}, which cannot be changed here")
        place = blocks.linears[name]
        base = getattr(*place)
        if (b.shape[0], a.shape[1]) != tuple(base.weight.shape):
            raise TrainerFailed(f"the parent's adapter does not fit the model at {name}")
        blocks.set(place, LoRALinear(base, a, b, adapter.alpha).requires_grad_(False))


def _continue(name: str, pair: Pair, parent_alpha: float, a: torch.Tensor, b: torch.Tensor, alpha: float) -> Pair:
    """The parent's matrices under another alpha, with fresh rows and zero columns where the rank grew."""
    old_a, old_b = pair
    if old_a.shape[1] != a.shape[1] or old_b.shape[0] != b.shape[0] or old_a.shape[0] != old_b.shape[1]:
        raise TrainerFailed(f"the parent's adapter does not fit the model at {name}")
    old_rank, rank = old_a.shape[0], max(old_a.shape[0], a.shape[0])
    rescaled = old_b * (parent_alpha / old_rank) / (alpha / rank)
    if rank == old_rank:
        return old_a.clone(), rescaled.clone()
    return torch.cat([old_a, a[old_rank:]]), torch.cat([rescaled, b[:, old_rank:]], dim=1)


def outside(parent: Adapter, blocks: Blocks, alpha: float) -> dict[str, Pair]:
    """The parent's matrices of blocks outside the range: the same bytes, unless the file's alpha is another."""
    factor = parent.alpha / alpha
    return {
        name: (a, b if factor == 1 else b * factor)
        for name, (a, b) in parent.pairs.items()
        if block_of(name) not in range(blocks.first, blocks.end)
    }


def block_of(tensor: str) -> int:
    """The number of the block that a tensor belongs to, -1 for none."""
    parts = tensor.split(".")
    return int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else -1


def read_adapter(path: Path) -> Adapter:
    """Raises TrainerFailed for a file that is damaged or no LoRA adapter."""
    try:
        alpha, pairs = adapter_gguf.read_lora(path)
    except ValueError as error:
        raise TrainerFailed(str(error)) from None
    return Adapter(alpha, {name: (_tensor(a), _tensor(b)) for name, (a, b) in pairs.items()})


def write_adapter(path: Path, architecture: str, alpha: float, pairs: Mapping[str, Pair], durable: bool = True) -> None:
    """See adapter_gguf.write_lora."""
    arrays = {name: (a.detach().numpy(), b.detach().numpy()) for name, (a, b) in pairs.items()}
    adapter_gguf.write_lora(path, architecture, alpha, arrays, durable=durable)


def read_control(path: Path, n_embd: int) -> dict[int, torch.Tensor]:
    """Per block index the vector added to that block's output. Raises TrainerFailed."""
    try:
        return {block: _tensor(vector) for block, vector in adapter_gguf.read_control(path, n_embd).items()}
    except ValueError as error:
        raise TrainerFailed(str(error)) from None


def _tensor(array: adapter_gguf.Floats) -> torch.Tensor:
    return torch.from_numpy(array.copy())
