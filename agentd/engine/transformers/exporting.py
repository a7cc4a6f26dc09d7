"""The low-rank adapters of a revision's chain as one: what all of them add to the base's weights.

Changes add up by standing side by side: the factors of one after the other make a product of their ranks' sum. As
safetensors they keep their order (their `ranks`), so that another device adds them one by one and gets the same bytes.
As a GGUF adapter they are what llama.cpp loads: its names, and the order of rows that its files have for attention.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from agentd.engine.transformers.learning import from_peft
from agentd.errors import Conflict
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.lora_blocks import write_adapter
from agentd.nn.meta_model import read_config, tensor_map

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def stacked(parts: list[tuple[dict[str, torch.Tensor], tuple[int, ...]]]) -> Factors:
    """A (r, in) and B (out, r) by layer, r being the sum of all ranks, from what revisions store. Raises ValueError."""
    adapters: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for tensors, ranks in parts:
        for layer, pairs in from_peft(tensors, ranks):
            adapters.setdefault(layer, []).extend(pairs)
    factors = {}
    for layer, pairs in adapters.items():
        if len({(a.shape[1], len(b)) for a, b in pairs}) > 1 or len(pairs) != sum(len(ranks) for _, ranks in parts):
            raise ValueError(f"the adapters of {layer} do not fit one another")
        factors[layer] = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
    return factors


def write_gguf(base: Path, module: nn.Module, factors: Factors, path: Path) -> None:
    """Writes an adapter for the GGUF file `base`, of which `module` is transformers' model.

    Raises Conflict where the base is no GGUF, or has a matrix in another form than rows in another order.
    """
    if base.is_dir():
        raise Conflict("the base is no GGUF file, and an adapter's names are those of one; use --format safetensors")
    file = GGUFFile(base)
    tensors = tensor_map(file, module, *read_config(file))
    theirs = {ours: name for name, ours in tensors.names.items()}
    pairs = {}
    for layer, (a, b) in factors.items():
        name = theirs.get(f"{layer}.weight")
        if name is None:
            raise Conflict(f"{layer} is no matrix of its own in the base's file")
        order = torch.arange(len(b), dtype=torch.float32)[:, None]
        converted = tensors.convert(name, order.numpy(), {})
        rows = order.flatten().long() if converted is None else torch.from_numpy(converted[1].copy()).flatten().long()
        if converted is None or not torch.equal(rows.sort().values, torch.arange(len(b))):
            raise Conflict(f"{layer} is stored in another form in the base's file than rows in another order")
        turned = torch.empty_like(b)
        turned[rows] = b
        pairs[name] = a, turned
    rank = max(len(a) for a, _ in pairs.values())
    write_adapter(path, file.header.architecture, float(rank), pairs, durable=False)
