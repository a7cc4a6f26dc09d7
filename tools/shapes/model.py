"""A model's metadata and tensors, as a family adds to them. Shapes are in torch's order, contiguous dimension last."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TINY = "tiny"
WINDOW = 8  # tokens of a tiny model's sliding window: texts of tests are longer


@dataclass(frozen=True)
class Size:
    """`vocabulary` 0 stands for the tiny tokenizer's; `more` are numbers that one family alone has."""

    n_embd: int
    n_ff: int
    n_head: int
    n_kv: int
    head_dim: int
    blocks: int
    vocabulary: int = 0
    tied: bool = True
    more: dict[str, int] = field(default_factory=dict)

    @property
    def is_tiny(self) -> bool:
        return not self.vocabulary


@dataclass(frozen=True)
class TensorShape:
    """`kind` says how its values are drawn: matrix, norm, bias, decay, or those of `values`."""

    name: str
    shape: tuple[int, ...]
    kind: str = "matrix"
    values: tuple[float, ...] = ()


class Model:
    """Metadata (without the architecture's prefix) and tensors of a model of one size, while a family adds to them."""

    def __init__(self, architecture: str, size: Size, vocabulary: int) -> None:
        self.architecture, self.size, self.vocabulary = architecture, size, vocabulary
        self.tensors: list[TensorShape] = []
        self.metadata: dict[str, Any] = {
            "block_count": size.blocks,
            "context_length": 2048 if size.is_tiny else 32768,
            "embedding_length": size.n_embd,
            "feed_forward_length": size.n_ff,
            "attention.head_count": size.n_head,
            "attention.head_count_kv": size.n_kv,
            "attention.key_length": size.head_dim,
            "attention.value_length": size.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": size.head_dim,
            "rope.freq_base": 1e6,
            "vocab_size": vocabulary,
        }
        self.add("token_embd.weight", vocabulary, size.n_embd)

    def add(self, name: str, *shape: int, kind: str = "matrix", values: Sequence[float] = ()) -> None:
        self.tensors.append(TensorShape(name, shape, kind, tuple(values)))

    def norm(self, name: str, width: int | None = None, *, bias: bool = False) -> None:
        self.add(f"{name}.weight", width or self.size.n_embd, kind="norm")
        if bias:
            self.add(f"{name}.bias", width or self.size.n_embd, kind="bias")

    def linear(self, name: str, n_out: int, n_in: int, *, bias: bool = False) -> None:
        self.add(f"{name}.weight", n_out, n_in)
        if bias:
            self.add(f"{name}.bias", n_out, kind="bias")

    def attention(
        self,
        block: str,
        *,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: str = "",
        gated: bool = False,
        head_dim: int = 0,
    ) -> None:
        """qk_norm: "head" (over a head's width) or "whole"; gated: the queries' matrix holds a gate beside them."""
        size, head_dim = self.size, head_dim or self.size.head_dim
        q, kv = size.n_head * head_dim, size.n_kv * head_dim
        self.linear(f"{block}.attn_q", q * (2 if gated else 1), size.n_embd, bias=bias)
        self.linear(f"{block}.attn_k", kv, size.n_embd, bias=bias)
        self.linear(f"{block}.attn_v", kv, size.n_embd, bias=bias)
        self.linear(f"{block}.attn_output", size.n_embd, q, bias=out_bias)
        if qk_norm:
            self.norm(f"{block}.attn_q_norm", q if qk_norm == "whole" else head_dim)
            self.norm(f"{block}.attn_k_norm", kv if qk_norm == "whole" else head_dim)

    def feed_forward(self, block: str, *, gated: bool = True, bias: bool = False) -> None:
        size = self.size
        if gated:
            self.linear(f"{block}.ffn_gate", size.n_ff, size.n_embd, bias=bias)
        self.linear(f"{block}.ffn_up", size.n_ff, size.n_embd, bias=bias)
        self.linear(f"{block}.ffn_down", size.n_embd, size.n_ff, bias=bias)

    def experts(self, block: str, n: int, width: int, *, bias: bool = False) -> None:
        """`n` gated feed-forward networks of `width`, and their router."""
        n_embd = self.size.n_embd
        self.add(f"{block}.ffn_gate_inp.weight", n, n_embd)
        self.add(f"{block}.ffn_gate_exps.weight", n, width, n_embd)
        self.add(f"{block}.ffn_up_exps.weight", n, width, n_embd)
        self.add(f"{block}.ffn_down_exps.weight", n, n_embd, width)
        if bias:
            self.add(f"{block}.exp_probs_b.bias", n, kind="bias")

    def end(self, norm: str = "output_norm", *, bias: bool = False) -> None:
        self.norm(norm, bias=bias)
        if not self.size.tied:
            self.add("output.weight", self.vocabulary, self.size.n_embd)

    @property
    def blocks(self) -> list[str]:
        return [f"blk.{i}" for i in range(self.size.blocks)]
