"""LoRA matrices on the blocks' linear layers, and the GGUF adapter files llama.cpp loads them from."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn

from agentd.durable import sync_directory
from agentd.errors import TrainerFailed
from agentd.trainer.blocks import Blocks, Unsupported
from agentd.trainer.products import adapted

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (rank, in) and B (out, rank); the layer's weight becomes W + alpha / rank * B A."""


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable low-rank update (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
        super().__init__()
        self.base = base  # its weight comes and goes
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale = alpha / a.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return adapted(x, self.base.weight, self.base.bias, self.a, self.b, self.scale)


@dataclass(frozen=True)
class Adapter:
    """A GGUF adapter file: alpha, and a pair of matrices per tensor of the model."""

    alpha: float
    pairs: dict[str, Pair]


def attach(blocks: Blocks, rank: int, alpha: float, seed: int, parent: Adapter | None) -> dict[str, LoRALinear]:
    """Puts LoRA on every linear layer of the range, by GGUF tensor name; starts from `parent` where it has the tensor.

    A is drawn from N(0, 1 / in) by the seed and the tensor's name, so a block starts the same in every range; B is 0.
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
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        a, b = torch.randn(rank, n_in, generator=generator) / n_in**0.5, torch.zeros(n_out, rank)
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
    fields, tensors = _read(path)
    if fields.get("adapter.type") != "lora":
        raise TrainerFailed(f"{path} is not a LoRA adapter")
    pairs = {}
    for name in tensors:
        if name.endswith(".lora_a"):
            tensor = name.removesuffix(".lora_a")
            if f"{tensor}.lora_b" not in tensors:
                raise TrainerFailed(f"{path} has no {tensor}.lora_b")
            pairs[tensor] = (tensors[name], tensors[f"{tensor}.lora_b"])
    return Adapter(float(fields.get("adapter.lora.alpha", 0.0)), pairs)


def write_adapter(path: Path, architecture: str, alpha: float, pairs: Mapping[str, Pair], durable: bool = True) -> None:
    """Writes `path` so that a reader sees the whole file or none: temporary file, fsync, rename, fsync.

    durable  without it there is no fsync, for files that nobody needs after a power cut
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name in sorted(pairs):
            a, b = pairs[name]
            writer.add_tensor(f"{name}.lora_a", a.detach().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.detach().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_directory(path.parent)


def read_control(path: Path, n_embd: int) -> dict[int, torch.Tensor]:
    """A llama.cpp control vector file: per block index the vector added to that block's output."""
    vectors = {int(name[10:]): vector for name, vector in _read(path)[1].items() if name.startswith("direction.")}
    if not vectors:
        raise TrainerFailed(f"{path} is not a control vector")
    if wrong := [i for i, vector in vectors.items() if vector.shape != (n_embd,)]:
        raise TrainerFailed(f"the control vector {path} does not fit the model at block {wrong[0]}")
    return vectors


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and float32 tensors of a small GGUF file that is no model."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
        }
    except OSError as error:
        raise TrainerFailed(f"{path}: {error.strerror or error}") from None
    except (ValueError, IndexError, KeyError) as error:
        raise TrainerFailed(f"{path} is damaged or cut short: {error}") from None
    return fields, tensors
