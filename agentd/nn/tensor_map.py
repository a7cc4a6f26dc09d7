"""Where a GGUF's tensors belong in transformers' model, by gguf-py's own table of names; and in which form.

What the file stores differently is found by rule: rows in the order of another rope (agentd/formats/gguf_layout.py),
norms that the file has as factors and transformers as distances from 1 (tried on the module itself), convolutions
without their dimension of 1, one matrix in place of several or several in place of one, heads of a gated delta net in
another order, and logarithms that the file has as what they stand for.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agentd.formats.gguf_layout import PERMUTED, ROPE_ON_NEIGHBOURS
from agentd.nn.gguf_file import GGUFFile

Array = NDArray[np.float32]

# A parameter's name within its block -> the tensors that make it, side by side along a dimension; the first that the
# file has. Only where gguf-py's table has no name, or one that the file does not have.
_COMPOSED: tuple[tuple[str, tuple[tuple[str, ...], ...], int], ...] = (
    (r"experts\.gate_up_proj", (("ffn_gate_up_exps.weight",), ("ffn_gate_exps.weight", "ffn_up_exps.weight")), 1),
    (r"experts\.down_proj", (("ffn_down_exps.weight",),), 0),
    (r"(router|gate|router\.layer)\.weight", (("ffn_gate_inp.weight",),), 0),
    (
        r"shared_mlp\.input_linear\.weight",
        (("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), ("ffn_gate.weight", "ffn_up.weight")),
        0,
    ),
    (r"shared_mlp\.output_linear\.weight", (("ffn_down_shexp.weight",), ("ffn_down.weight",)), 0),
    (r"gate_up_proj\.weight", (("ffn_gate.weight", "ffn_up.weight"),), 0),
    (r"qkv_proj\.(?P<leaf>weight|bias)", (("attn_q.{leaf}", "attn_k.{leaf}", "attn_v.{leaf}"),), 0),
    (r"(expert_bias|e_score_correction_bias)", (("exp_probs_b.bias",),), 0),
    (r"dt_bias", (("ssm_dt.bias",),), 0),
)
# Parts of one tensor of the file, from the first row on.
_SPLIT = {
    "attn_q": "attn_qkv",
    "attn_k": "attn_qkv",
    "attn_v": "attn_qkv",
}
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class _Part:
    """Rows [begin, end) along `dim` of the parameter `name` come from rows [first, first + end - begin) of a tensor.
    `whole`: they are all of either."""

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    begin: int = 0
    end: int = 0
    first: int = 0
    whole: bool = True


class TensorMap:
    """`names` has transformers' name of each tensor of the file that is one of its parameters, in whatever form."""

    def __init__(self, file: GGUFFile, model: nn.Module, config: Any) -> None:
        self._file, self._model, self._config = file, model, config
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._parts: dict[str, list[_Part]] = {}
        architecture = next(
            (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.header.architecture), None
        )
        table = None if architecture is None else gguf.get_tensor_name_map(architecture, file.header.block_count)
        for name in self._shapes:
            for tensor, part in self._sources(table, name):
                self._parts.setdefault(tensor, []).append(part)
        kinds: dict[type[nn.Module], float] = {}
        # looked at now: later, parts of the model may have others in their place
        self._offsets = {name: self._offset(name, kinds) for name in self._shapes}
        self.names = {
            tensor: parts[0].name for tensor, parts in self._parts.items() if len(parts) == 1 and parts[0].whole
        }

    def convert(self, tensor: str, stored: Array, parts: dict[str, torch.Tensor]) -> tuple[str, Array] | None:
        """transformers' name for a tensor and its weights as torch holds them: `stored` itself where they are the same.

        None if it has no name of its own there, because several of the file's make one of transformers', or one makes
        several; what it contributes to is put into `parts`.
        """
        wanted = self._parts.get(tensor, [])
        if not wanted:
            return None
        if len(wanted) == 1 and wanted[0].whole:
            (part,) = wanted
            return part.name, self._turned(tensor, part, stored)
        for part in wanted:
            if part.name not in parts:
                parts[part.name] = torch.zeros(part.shape)
            if any(stored.strides):  # else there is nothing in it: a tensor's shape alone
                rows = np.moveaxis(stored, part.dim, 0)[part.first : part.first + part.end - part.begin]
                target = parts[part.name].movedim(part.dim, 0)[part.begin : part.end]
                target.copy_(torch.from_numpy(np.ascontiguousarray(self._ordered(_which(tensor, part), rows))))
        return None

    def _sources(self, table: Any, name: str) -> Iterator[tuple[str, _Part]]:
        """The tensors of the file that make a parameter."""
        shape, base, leaf = self._shapes[name], name, ""
        if name.endswith((".weight", ".bias")):
            base, _, leaf = name.rpartition(".")
        known = None if table is None else self._lookup(table, base)
        for tensor in () if known is None else (f"{known}.{leaf}".rstrip("."), f"{known}.weight", f"{known}.bias"):
            if tensor in self._file.tensors:
                yield tensor, _Part(name, shape)
                return
        place = _BLOCK.search(name)
        if place is None:
            return
        block, rest = f"blk.{place[1]}.", place[2]
        for pattern, choices, dim in _COMPOSED:
            if match := re.search(rf"(?:^|\.){pattern}$", rest):
                for choice in choices:
                    tensors = [block + each.format(**match.groupdict()) for each in choice]
                    if all(each in self._file.tensors for each in tensors):
                        yield from self._side_by_side(name, tensors, dim)
                        return
        part = None if known is None else known.removeprefix(block)
        if part in _SPLIT and f"{block}{_SPLIT[part]}.{leaf}" in self._file.tensors:
            # Queries, keys and values in this order; the others' rows are all of the same parent.
            parent = name.rpartition(".")[0].rpartition(".")[0]
            rows = [self._shapes.get(f"{parent}.{each}_proj.{leaf}", (0,))[0] for each in ("q", "k", "v")]
            first = sum(rows[: ("attn_q", "attn_k", "attn_v").index(part)])
            yield f"{block}{_SPLIT[part]}.{leaf}", _Part(name, shape, 0, 0, shape[0], first, whole=False)

    def _side_by_side(self, name: str, tensors: list[str], dim: int) -> Iterator[tuple[str, _Part]]:
        shape, begin = self._shapes[name], 0
        for tensor in tensors:
            if len(tensors) == 1:
                yield tensor, _Part(name, shape)
                return
            n = self._file.shape(tensor)[dim]
            yield tensor, _Part(name, shape, dim, begin, begin + n, whole=False)
            begin += n

    def _lookup(self, table: Any, base: str) -> str | None:
        """gguf-py's name; its table has some models' parameters by other beginnings."""
        parts = base.split(".")
        for i in range(len(parts)):
            if (found := table.get_name(".".join(parts[i:]))) is not None:
                return str(found)
            if parts[i] == "layers":
                break
        return None

    def _turned(self, tensor: str, part: _Part, stored: Array) -> Array:
        """A whole tensor as the parameter."""
        virtual = not any(stored.strides)
        if part.name.endswith("A_log"):
            return self._heads(part.name, np.log(-stored).reshape(part.shape)) if not virtual else _empty(part.shape)
        offset = self._offsets[part.name]
        reshaped = stored.shape != part.shape and stored.size == int(np.prod(part.shape))
        same = (
            not offset
            and not reshaped
            and not self._is_permuted(_which(tensor, part))
            and not self._is_reordered(part.name)
        )
        if same:
            return stored
        if virtual:
            return _empty(part.shape if reshaped else stored.shape)
        weights = self._ordered(_which(tensor, part), stored)
        weights = weights - np.float32(offset) if offset else weights
        return self._heads(part.name, weights.reshape(part.shape) if reshaped else weights)

    def _ordered(self, which: str, rows: Array) -> Array:
        """Rows of queries or keys in transformers' order."""
        if not self._is_permuted(which):
            return rows
        heads = self._config.num_attention_heads if which == "attn_q" else self._config.num_key_value_heads
        turned = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
        return turned.swapaxes(2, 1).reshape(rows.shape)

    def _is_permuted(self, which: str) -> bool:
        return self._file.header.architecture in ROPE_ON_NEIGHBOURS and which in PERMUTED

    def _offset(self, name: str, kinds: dict[type[nn.Module], float]) -> float:
        """What transformers' module adds to a norm's weight by itself: 1, or 0 for everything else."""
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(self._shapes[name]) != 1:
            return 0.0
        module = self._model.get_submodule(path)
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _added(module, self._shapes[name][0])
        return kinds[kind]

    def _is_reordered(self, name: str) -> bool:
        """Whether it has heads of values of a gated delta net that are stored in another order: by what they share keys
        with last, where there are more of them than of keys."""
        n_v = getattr(self._config, "linear_num_value_heads", None)
        return ".linear_attn." in name and n_v != self._config.linear_num_key_heads and not name.endswith("norm.weight")

    def _heads(self, name: str, weights: Array) -> Array:
        if not self._is_reordered(name):
            return weights
        config = self._config
        n_k, n_v = config.linear_num_key_heads, config.linear_num_value_heads
        dim = 1 if name.endswith("out_proj.weight") else 0
        moved = np.moveaxis(weights, dim, 0)
        keys = 2 * n_k * config.linear_key_head_dim if re.search(r"in_proj_qkv|conv1d", name) else 0
        values = moved[keys:]
        width = len(values) // n_v
        ordered = values.reshape(n_v // n_k, n_k, width, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
        return np.ascontiguousarray(np.moveaxis(np.concatenate([moved[:keys], ordered]), 0, dim))


def _which(tensor: str, part: _Part) -> str:
    """The kind of a tensor, or of the part of a fused one: attn_q, ffn_up, ..."""
    kind = tensor.split(".")[-2] if "." in tensor else tensor
    fused = next((name for name in ("q", "k", "v") if f".{name}_proj." in part.name), None)
    return f"attn_{fused}" if kind == "attn_qkv" and fused else kind


def _empty(shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.float32(0), shape)


def _added(module: nn.Module, width: int) -> float:
    """Tried: with a weight of zero such a norm gives what it is given, scaled, and any other gives zero."""
    weight = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(torch.zeros(width), requires_grad=False)
    try:
        with torch.no_grad():
            out = module(torch.randn(1, width, generator=torch.Generator().manual_seed(0)))
        return 1.0 if isinstance(out, torch.Tensor) and bool(out.abs().max() > 0) else 0.0
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return 0.0
    finally:
        module._parameters["weight"] = weight
