"""A model's shapes, from its file's header or as given: all that the footprint has to know of it."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from agentd.budget.equations import Transformer
from agentd.formats.checkpoint_header import CheckpointHeader
from agentd.formats.gguf_header import Header
from agentd.formats.gguf_layout import PERMUTED, ROPE_ON_NEIGHBOURS

F32, F16 = 4, 2  # bytes

_BLOCK = re.compile(r"\.(\d+)\.")  # the number of a block in a tensor's name


@dataclass(frozen=True)
class ModelShapes:
    """A model's shapes. `block_bytes` and `block_parameters` are per block, as stored in the file.

    `attention_blocks` are those with keys and values, all of them where None; `state_bytes` are those of one sequence's
    recurrent states. `plain_parameters` are, per block, those of the matrices that get LoRA, and `lora_width` is the
    sum of these matrices' (inputs + outputs): parameters at rank 1.
    """

    name: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    tied: bool
    block_bytes: tuple[int, ...]
    block_parameters: tuple[int, ...]
    lora_width: tuple[int, ...]
    plain_parameters: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    attention_blocks: int | None = None
    state_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.block_bytes) + self.embedding_bytes + self.head_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers that have them, float16 as llama.cpp keeps them."""
        layers = self.n_layer if self.attention_blocks is None else self.attention_blocks
        return 2 * layers * self.n_head_kv * self.head_dim * F16

    @classmethod
    def from_header(cls, header: Header) -> "ModelShapes":
        """From a GGUF file's metadata and tensor table."""
        name, tensors = header.architecture, {tensor.name: tensor for tensor in header.tensors}
        blocks: list[list[Any]] = [[] for _ in range(header.block_count)]
        for tensor in header.tensors:
            prefix, _, rest = tensor.name.partition(".")
            number = rest.partition(".")[0]
            if prefix == "blk" and number.isdigit() and int(number) < len(blocks):
                blocks[int(number)].append(tensor)
        skipped = PERMUTED if name in ROPE_ON_NEIGHBOURS else ()
        matrices = [
            [t for t in block if len(t.shape) == 2 and t.name.split(".")[2] not in skipped and min(t.shape) > 1]
            for block in blocks
        ]
        n_embd, n_head = header.embedding_length, header.head_count or 1
        key_length = header.metadata.get(f"{name}.attention.key_length")
        embedding, head = tensors.get("token_embd.weight"), tensors.get("output.weight")
        return cls(
            name=name,
            n_layer=header.block_count,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=header.head_count_kv or n_head,
            head_dim=key_length if isinstance(key_length, int) else n_embd // n_head,
            n_ff=header.feed_forward_length or 4 * n_embd,
            n_vocab=embedding.shape[-1] if embedding is not None else header.vocab_size or 0,
            tied=head is None,
            block_bytes=tuple(sum(t.size for t in block) for block in blocks),
            block_parameters=tuple(sum(math.prod(t.shape) for t in block) for block in blocks),
            lora_width=tuple(sum(sum(t.shape) for t in block) for block in matrices),
            plain_parameters=tuple(sum(math.prod(t.shape) for t in block) for block in matrices),
            embedding_bytes=embedding.size if embedding is not None else 0,
            head_bytes=head.size if head is not None else 0,
            **_recurrent(header, blocks),
        )

    @classmethod
    def from_checkpoint(cls, header: CheckpointHeader) -> "ModelShapes":
        """From a directory of transformers; bytes are those of float32 until `served` says otherwise."""
        number = header.number
        numbered = [int(place[1]) for name in header.shapes if (place := _BLOCK.search(name)) is not None]
        n_layer = number("num_hidden_layers", "n_layer", "n_layers", "num_layers") or max(numbered, default=0) + 1
        n_embd = number("hidden_size", "n_embd", "d_model") or 1
        n_head = number("num_attention_heads", "n_head", "n_heads", "num_heads") or 1
        blocks = [0] * n_layer
        widths = [0] * n_layer
        for name, shape in header.shapes.items():
            place = _BLOCK.search(name)
            if place is None or int(place[1]) >= n_layer:
                continue
            blocks[int(place[1])] += math.prod(shape)
            widths[int(place[1])] += sum(shape) if len(shape) == 2 else 0
        outside = {name: shape for name, shape in header.shapes.items() if _BLOCK.search(name) is None}
        n_vocab = number("vocab_size") or 1
        tables = sum(math.prod(shape) for shape in outside.values() if len(shape) == 2 and n_vocab in shape)
        size = n_vocab * n_embd
        return cls(
            name=header.architecture,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=number("num_key_value_heads") or n_head,
            head_dim=number("head_dim") or n_embd // n_head,
            n_ff=number("intermediate_size", "n_inner", "ffn_dim") or 4 * n_embd,
            n_vocab=n_vocab,
            tied=tables <= size,
            block_bytes=tuple(F32 * n for n in blocks),
            block_parameters=tuple(blocks),
            lora_width=tuple(widths),
            plain_parameters=tuple(blocks),
            embedding_bytes=F32 * size,
            head_bytes=0 if tables <= size else F32 * size,
        )

    def served(self, itemsize: int) -> "ModelShapes":
        """The same model with every weight in `itemsize` bytes, as engine transformers serves it."""
        table = itemsize * self.n_vocab * self.n_embd
        return replace(
            self,
            block_bytes=tuple(itemsize * n for n in self.block_parameters),
            embedding_bytes=table,
            head_bytes=0 if self.tied else table,
        )

    @classmethod
    def dense(
        cls,
        name: str,
        *,
        n_layer: int,
        n_embd: int,
        n_head: int,
        n_head_kv: int,
        n_ff: int,
        n_vocab: int,
        tied: bool = False,
        bits: float = 5.0,
    ) -> "ModelShapes":
        """A llama-like model that is not here, from its shapes. `bits` per weight, scales included."""
        head_dim = n_embd // n_head
        kv = n_head_kv * head_dim
        parameters = 2 * n_embd * n_embd + 2 * n_embd * kv + 3 * n_embd * n_ff + 2 * n_embd
        vocabulary = int(n_vocab * n_embd * bits / 8)
        return cls(
            name=name,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_ff=n_ff,
            n_vocab=n_vocab,
            tied=tied,
            block_bytes=(int(parameters * bits / 8),) * n_layer,
            block_parameters=(parameters,) * n_layer,
            lora_width=(n_embd + kv + 2 * n_embd + 3 * (n_embd + n_ff),) * n_layer,
            plain_parameters=(parameters - 2 * n_embd,) * n_layer,
            embedding_bytes=vocabulary,
            head_bytes=0 if tied else vocabulary,
        )

    def in_symbols(self, context: int, *, batch: int = 1, bytes_per_parameter: float = 2) -> Transformer:
        """The model in the symbols of the paper, for its equations. `context` in tokens."""
        return Transformer(
            N=context,
            L=self.n_layer,
            D=self.n_embd,
            H=self.n_head,
            V=self.n_vocab,
            B=batch,
            b=bytes_per_parameter,
        )


def _recurrent(header: Header, blocks: list[list[Any]]) -> dict[str, Any]:
    """How many blocks have keys and values, and the bytes of a sequence's states in the others (as llama.cpp keeps
    them, in float32); nothing where all have keys and values."""
    kinds = [{t.name.split(".")[2] for t in block} for block in blocks]
    n = sum(any(name.startswith(("ssm_", "shortconv")) for name in kind) for kind in kinds)
    if not n:
        return {}

    def number(key: str) -> int:
        value = header.metadata.get(f"{header.architecture}.{key}")
        return value if isinstance(value, int) else 0

    inner, state = number("ssm.inner_size"), number("ssm.state_size")
    convolved = max(0, number("ssm.conv_kernel") - 1) * (inner + 2 * number("ssm.group_count") * state)
    convolved += max(0, number("shortconv.l_cache") - 1) * header.embedding_length
    both = sum("ssm_in" in kind and "attn_k" in kind for kind in kinds)  # side by side in one block (Falcon H1)
    return {"attention_blocks": len(blocks) - n + both, "state_bytes": F32 * n * (inner * state + convolved)}
