"""What this software allocates for a pass: named terms with their formulas, from a model's real shapes.

Beyond what serving takes already; all sizes in bytes. The engine opens a background context over the same mapped
weights; the trainer is a process of its own. Constants marked "measured" are those of SmolLM2-135M on x86-64 with
llama-cpp-python 0.3.36 and torch 2.13.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from agentd.gguf_header import Header

F32, F16 = 4, 2
MIB = 1 << 20

# Engine, see engine/llamacpp/background.py: context, sequences and tokens of one micro-batch.
BACKGROUND_CONTEXT = 2048
BACKGROUND_SEQUENCES = 64
MICRO_BATCH = 192

ENGINE_RUNTIME = 10 * MIB  # measured: llama.cpp's bookkeeping of a context, graph metadata, Python's lists of tokens
TRAINER_RUNTIME = 300 * MIB  # measured: Python, torch, transformers and gguf imported, thread pool started

# Trainer, see trainer/loop.py, head.py and shortcuts.py. For its backward pass a token keeps multiples of D and n_ff in
# every block; the last block runs where it is scored, and keeps little more than attention's inputs. Fitted to measured
# peaks of k = 1 .. 8.
_KEPT_D, _KEPT_FF = 12, 10
_LAST_D = 12
_HEAD_SLICE = 4096
_TAP_WINDOW = 8 * MIB
_PER_EXAMPLE = 4096

_PERMUTED = ("attn_q", "attn_k")  # rows permuted in llama-family files: no LoRA there
_PERMUTED_IN = ("llama", "mistral")


@dataclass(frozen=True)
class Term:
    """One part of the footprint. `reduce` says what makes it smaller, empty where nothing does."""

    name: str
    bytes: int
    formula: str
    process: str = "engine"
    reduce: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def total(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms)


@dataclass(frozen=True)
class Architecture:
    """A model's shapes. `block_bytes` and `block_parameters` are per block, as stored in the file.

    `lora_width` is, per block, the sum of (inputs + outputs) over the matrices that get LoRA: parameters at rank 1.
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
    embedding_bytes: int
    head_bytes: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.block_bytes) + self.embedding_bytes + self.head_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, float16 as llama.cpp keeps them."""
        return 2 * self.n_layer * self.n_head_kv * self.head_dim * F16

    @classmethod
    def from_header(cls, header: Header) -> "Architecture":
        """From a GGUF file's metadata and tensor table."""
        name, tensors = header.architecture, {tensor.name: tensor for tensor in header.tensors}
        blocks: list[list[Any]] = [[] for _ in range(header.block_count)]
        for tensor in header.tensors:
            prefix, _, rest = tensor.name.partition(".")
            number = rest.partition(".")[0]
            if prefix == "blk" and number.isdigit() and int(number) < len(blocks):
                blocks[int(number)].append(tensor)
        skipped = _PERMUTED if name in _PERMUTED_IN else ()
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
            embedding_bytes=embedding.size if embedding is not None else 0,
            head_bytes=head.size if head is not None else 0,
        )


@dataclass(frozen=True)
class Workload:
    """What a pass works on. Tokens are counted without the prefix that all sequences share.

    seq_len      tokens of the longest sequence
    tokens       tokens of all sequences together
    examples     number of examples
    scored       scored positions per sequence: those of the choices' terms and of the target
    micro_tokens tokens in one forward pass of the trainer, padding included; 0: the trainer's own choice
    """

    seq_len: int
    tokens: int
    examples: int
    batch: int = 16
    rank: int = 8
    prefix: int = 0
    scored: int = 3
    context: int = BACKGROUND_CONTEXT
    micro_tokens: int = 0
    checkpoint: bool = False


def engine_terms(arch: Architecture, workload: Workload, *, runtime: int | None = None) -> list[Term]:
    """What the engine allocates for scoring, tapping and zeroth-order steps, in any method."""
    context = min(workload.context, BACKGROUND_CONTEXT)
    sequences = max(1, min(BACKGROUND_SEQUENCES, MICRO_BATCH // max(1, workload.seq_len)))
    rows = min(MICRO_BATCH, max(workload.scored, sequences * workload.scored))
    # A token's tensors in llama.cpp's graph: residual, norm, q, attention output, the feed-forward's three.
    per_token = F32 * (6 * arch.n_embd + 2 * arch.n_head * arch.head_dim + 3 * arch.n_ff)
    return [
        Term("runtime", ENGINE_RUNTIME if runtime is None else runtime, "measured"),
        Term(
            "background KV cache",
            context * arch.kv_bytes_per_token,
            "context x 2 L x n_head_kv x head_dim x 2 B",
            reduce="lower model.context",
        ),
        Term(
            "logits",
            (max(BACKGROUND_SEQUENCES, rows) + 2 * rows + 4) * arch.n_vocab * F32,
            "(64 or rows, kept by llama.cpp + 2 rows, in its graph and as log-probabilities + 4) x V x 4 B",
            reduce="shorter answers (scored positions) take less",
        ),
        Term(
            "activations",
            MICRO_BATCH * per_token,
            "192 tokens x (6 D + 2 H head_dim + 3 n_ff) x 4 B",
        ),
        Term(
            "control vectors",
            6 * (arch.n_layer - 1) * arch.n_embd * F32,
            "6 (vector, direction, sum; serving and candidate) x (L - 1) x D x 4 B",
        ),
    ]


def trainer_terms(arch: Architecture, workload: Workload, k: int, *, runtime: int | None = None) -> list[Term]:
    """What the trainer process allocates when it trains the last `k` blocks (1 <= k <= L)."""
    tokens = trainer_tokens(arch, workload, k)
    kept = min(k, 2) - 1 if workload.checkpoint else k - 1
    per_token = F32 * (_KEPT_D * arch.n_embd + _KEPT_FF * arch.n_ff)
    lora = workload.rank * sum(arch.lora_width[-k:])
    rows = min(tokens, workload.scored * max(1, tokens // max(1, workload.seq_len)))
    terms = [
        Term("runtime", TRAINER_RUNTIME if runtime is None else runtime, "measured", "trainer"),
        Term(
            "block weights",
            F32 * sum(arch.block_parameters[-k:]),
            "parameters of the last k blocks x 4 B",
            "trainer",
            "lower adapt.blocks",
        ),
        Term("head", F16 * arch.n_vocab * arch.n_embd, "V x D x 2 B", "trainer"),
        Term(
            "head, dequantised slice",
            3 * F32 * _HEAD_SLICE * arch.n_embd,
            "3 x 4096 vocabulary rows x D x 4 B",
            "trainer",
        ),
        Term(
            "logits slice",
            3 * F32 * _HEAD_SLICE * rows,
            "3 x scored positions of a micro-batch x 4096 x 4 B",
            "trainer",
            "shorter answers (scored positions) take less",
        ),
        Term(
            "LoRA and AdamW",
            6 * F32 * lora,
            "6 (weight, gradient, mean, square, best, temporary) x rank x sum(inputs + outputs) x 4 B",
            "trainer",
            "lower adapt.rank",
        ),
        Term(
            "activations",
            kept * tokens * per_token,
            f"(k - 1; 1 with checkpointing) x tokens of a micro-batch x ({_KEPT_D} D + {_KEPT_FF} n_ff) x 4 B",
            "trainer",
            "lower adapt.blocks, or shorten the examples",
        ),
        Term(
            "activations of the last block",
            tokens * F32 * _LAST_D * arch.n_embd,
            f"tokens of a micro-batch x {_LAST_D} D x 4 B",
            "trainer",
            "shorten the examples",
        ),
        Term("tap", min(_TAP_WINDOW, F32 * workload.tokens * arch.n_embd), "at most 8 MiB stay mapped", "trainer"),
        Term("examples", _PER_EXAMPLE * workload.examples, "4 kB each as Python objects", "trainer"),
    ]
    slack = total(terms[1:]) // 20
    return [*terms, Term("allocator", slack, "5 % of the terms above but the runtime", "trainer")]


def trainer_tokens(arch: Architecture, workload: Workload, k: int) -> int:
    """Tokens in one forward pass of the trainer: what it allows (trainer/loop.py), or all there are in a batch."""
    width = max(arch.n_ff, 4 * arch.n_embd)
    blocks = 1 if workload.checkpoint else max(1, k - 1)
    allowed = workload.micro_tokens or max(128, min(4096, (64 * MIB) // (4 * 5 * width * blocks)))
    longest = workload.prefix + workload.seq_len
    return max(longest, min(allowed, workload.prefix + workload.batch * workload.seq_len))
