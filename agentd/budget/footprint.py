"""What this software allocates for a pass: named terms with their formulas, from a model's real shapes.

Beyond what serving takes already; all sizes in bytes. The engine opens a background context over the same mapped
weights; the trainer is a process of its own; the daemon keeps the examples. Constants marked "measured" are those of
SmolLM2-135M on x86-64 with llama-cpp-python 0.3.36 and torch 2.13; `runtime` and `budget.calibration` replace them by
this machine's own. docs/memory.md derives the formulas and has the measurements, tools/bench/memory.py repeats them.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from agentd.budget.model_shapes import F16, F32, ModelShapes
from agentd.budget.workload import Workload, micro_batch
from agentd.host.cpu import has_amx
from agentd.limits import (
    BACKGROUND_CONTEXT,
    DRIFT_ROWS,
    MICRO_BATCH,
    ONE_BLOCK_BYTES,
    PART_WEIGHTS,
    RECURRENT_SEQUENCES,
    TOGETHER_BYTES,
    attends_apart,
    scored_rows,
)

MIB = 1 << 20

ENGINE_RUNTIME = 12 * MIB  # measured: llama.cpp's bookkeeping of a context, graph metadata, code paged in
ZEROTH_ORDER_RUNTIME = 3 * MIB  # measured: code and buffers of perturbed losses
SERVING_RUNTIME = 62 * MIB  # measured: Python, numpy, llama.cpp, the vocabulary, one decode's buffers
DAEMON_RUNTIME = 52 * MIB  # measured: Python, the web server, SQLite
TRAINER_IMPORTS = 175 * MIB  # measured, and measured anew on every machine: Python, torch, transformers, the frame
TRAINER_START = 246 * MIB  # as above, with all the code that importing ran
TRAINER_STEP = 10 * MIB  # measured: what the first step adds: thread pool, autograd
_RUN_AGAIN = 0.65  # measured: of the code that importing ran, what training runs; new files have more of it in memory
_START_MARGIN = 1.1  # measured: the start of a pass beside that of the probe
# Measured: the code that oneDNN makes for products of bfloat16, and the room they work in; more of both with AMX.
TRAINER_BF16, TRAINER_AMX = 34 * MIB, 56 * MIB

_MASK = 1 + F32  # bytes of an element of the attention mask
# Measured: what glibc's heap holds beyond what is allocated in it, after micro-batches of changing sizes: 35 % of the
# activations and gradients up to 64 MiB, and 44 % of the rest, seen with texts of 900 tokens in all 30 blocks.
_HOLES, _HOLES_UP_TO, _FEWER_HOLES = 0.35, 64 * MIB, 0.44
_BETWEEN_TRIMS = 8 * MIB  # where the heap is not tidied after every step

# Python objects: a token in a list (pointer and int), and what surrounds an example's tokens in each process.
_TOKEN = 40
_EXAMPLE = {"daemon": 9000, "engine": 2500, "trainer": 6000}
_TERM = 150  # a scored term: a list of three numbers


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


def serving_terms(arch: ModelShapes, *, kv_tokens: int, engine: int | None = None) -> list[Term]:
    """What the daemon and the engine take while they serve and nothing is learned.

    kv_tokens  in use: the KV cache of a slot takes memory as it fills
    engine     what one takes before that, measured: weights of some types llama.cpp keeps once more, repacked
    """
    measured = "measured, with its weights, mapped and repacked"
    own = [Term("runtime", SERVING_RUNTIME, "measured"), Term("mapped weights", arch.weight_bytes, "those in the file")]
    state = [Term("recurrent state", arch.state_bytes, "states of one sequence")] if arch.state_bytes else []
    return [
        *state,
        Term("runtime", DAEMON_RUNTIME, "measured", "daemon"),
        *(own if engine is None else [Term("engine", engine, measured)]),
        Term("KV cache", kv_tokens * arch.kv_bytes_per_token, "tokens in use x 2 L x n_head_kv x head_dim x 2 B"),
    ]


def daemon_terms(workload: Workload) -> list[Term]:
    """What the daemon keeps of a pass's examples."""
    return [_examples(workload, "daemon")]


def engine_terms(
    arch: ModelShapes,
    workload: Workload,
    k: int = 0,
    *,
    tapped: bool = False,
    zeroth_order: bool = True,
    runtime: int | None = None,
) -> list[Term]:
    """What the engine allocates for scoring, tapping and zeroth-order steps beside serving.

    tapped        it gives the trainer every trained block's input, step by step
    zeroth_order  it perturbs control vectors
    """
    context = min(workload.context, BACKGROUND_CONTEXT)
    tokens = max(MICRO_BATCH, min(workload.longest, context))
    most = scored_rows(arch.n_vocab)
    rows = min(most, max(1, int(MICRO_BATCH / workload.mean)) * workload.scored)
    in_graph = max(rows, min(most, DRIFT_ROWS))
    # A token's tensors in llama.cpp's graph: residual, norm, q, attention output, the feed-forward's three.
    per_token = F32 * (6 * arch.n_embd + 2 * arch.n_head * arch.head_dim + 3 * arch.n_ff)
    logits = (in_graph + DRIFT_ROWS) * arch.n_vocab * F32
    terms = [
        Term("runtime", ENGINE_RUNTIME if runtime is None else runtime, "measured"),
        Term(
            "background KV cache",
            min(context, workload.longest + MICRO_BATCH) * arch.kv_bytes_per_token,
            "(longest example + 128 tokens) x 2 L x n_head_kv x head_dim x 2 B",
            reduce="lower model.context, or shorten the examples",
        ),
        Term(
            "logits",
            logits,
            "(scored rows of a decode, 16 to 64 as 16 MiB hold them, in llama.cpp + 40 as log-probabilities) x V x 4 B",
        ),
        Term(
            "compute buffer",
            max(MICRO_BATCH * per_token, in_graph * arch.n_vocab * F32),
            "larger of: 128 tokens x (6 D + 2 H d + 3 n_ff) x 4 B; scored rows x V x 4 B",
            reduce="shorter answers (scored positions) take less",
        ),
        _examples(workload, "engine"),
    ]
    if arch.state_bytes:
        formula = f"{RECURRENT_SEQUENCES} sequences x their states"
        terms.append(Term("recurrent state", RECURRENT_SEQUENCES * arch.state_bytes, formula))
    if zeroth_order:
        vectors = 6 * (arch.n_layer - 1) * arch.n_embd * F32
        formula = "6 (vector, direction, sum; serving and candidate) x (L - 1) x D x 4 B + 3 MiB, measured"
        terms.append(Term("control vectors", vectors + ZEROTH_ORDER_RUNTIME, formula))
    if k:
        lora = workload.rank * sum(arch.lora_width[-k:])
        copies = 3 if tapped else 2  # of the step before, too
        formula = f"{copies} x rank x sum(inputs + outputs) x 4 B"
        terms.append(Term("candidate's LoRA", copies * F32 * lora, formula, reduce="lower adapt.rank or adapt.blocks"))
    if tapped:
        # While it taps there are no logits.
        rows = max(0, (k + 1) * tokens * arch.n_embd * F32 - logits)
        formula = "(k + 1) x tokens (128 or the longest example's) x D x 4 B, as far as that is more than the logits"
        terms.append(Term("tap", rows, formula, reduce="shorten the examples"))
    return terms


def stays_in_file(arch: ModelShapes, workload: Workload, k: int, *, one: bool) -> bool:
    """Whether the last `k` blocks are too large to be dequantised, all together or `one` after the other: then a part
    of a matrix is made whenever it is multiplied."""
    size = F16 if workload.bf16 else F32
    if one:
        return size * max(arch.block_parameters[-k:]) > ONE_BLOCK_BYTES
    return size * sum(arch.block_parameters[-k:]) > TOGETHER_BYTES


def trainer_terms(
    arch: ModelShapes,
    workload: Workload,
    k: int,
    *,
    tapped: bool = False,
    runtime: int | None = None,
    start: int | None = None,
) -> list[Term]:
    """What the trainer process allocates when it trains the last `k` blocks (1 <= k <= L).

    tapped   the engine gives every block's input; else they are computed here, from those of the lowest block
    runtime  bytes of a trainer that has not begun, see trainer/probe.py
    start    bytes that it took at most until then
    """
    one = workload.checkpoint or tapped
    tokens, examples = micro_batch(arch, workload, k, one)
    attention = arch.n_head * arch.head_dim  # keys and values are there for every head
    # A prefix that attends by itself leaves the outputs of attention twice (nn/tree_mask.py).
    outputs = 1 + attends_apart(workload.prefix, tokens)
    whole = tokens * (4 * arch.n_embd + (3 + outputs) * attention + 4 * arch.n_ff)
    last = tokens * (2 * arch.n_embd + (3 + outputs) * attention)
    wide = 0 if k == 1 else 4 * arch.n_ff  # the last block's feed-forward part runs where it is scored
    backward = tokens * (5 * arch.n_embd + wide)
    widths = arch.lora_width[-k:]
    rows = min(tokens, workload.scored * examples)
    part = min(arch.n_vocab, max(1, PART_WEIGHTS // arch.n_embd))  # rows of the head at a time
    if one:
        # The gradient at a block's input, and that at its output, for all of a step's micro-batches.
        batches = -(-workload.batch // examples)
        step = batches * workload.prefix + min(workload.tokens, workload.batch * workload.seq_len)
        floats, formula = (
            whole + 2 * step * arch.n_embd,
            f"one block's rows x (4 D + {3 + outputs} H d + 4 n_ff); 2 x step x D",
        )
        if not tapped:
            floats, formula = floats + k * step * arch.n_embd, f"{formula}; k x step x D"
        formula += " (step: tokens of a batch)"
        which = "one block"
        copies = 4 if tapped else 3
        state = copies * sum(widths) + 3 * max(widths)
        fourth = "; one more, measured" if tapped else ""
        state_formula = f"({copies} (weight, mean, square{fourth}) x all + 3 (gradient, temporaries) x one block)"
    else:
        floats, formula = (k - 1) * whole, f"(k - 1) x rows x (4 D + {3 + outputs} H d + 4 n_ff)"
        which = "the last k blocks"
        state, state_formula = 5 * sum(widths), "5 (weight, gradient, mean, square, temporary)"
    size = F16 if workload.bf16 else F32
    several: Callable[[Iterable[int]], int] = max if one else sum
    weights, weights_formula = size * several(arch.block_parameters[-k:]), f"parameters of {which} x {size} B"
    if stays_in_file(arch, workload, k, one=one):
        others = [a - b for a, b in zip(arch.block_parameters[-k:], arch.plain_parameters[-k:], strict=True)]
        weights = (size + F32) * PART_WEIGHTS + F32 * several(others)
        weights_formula = f"a part of a matrix, 1.2 M weights x {size + F32} B; of {which} what is no matrix x 4 B"
    activations = F32 * (floats + last + backward)
    beyond = max(0, activations - _HOLES_UP_TO)
    holes = int(_HOLES * (activations - beyond) + _FEWER_HOLES * beyond) + (0 if one else _BETWEEN_TRIMS)
    compiled = (TRAINER_AMX if has_amx() else TRAINER_BF16) if workload.bf16 else 0
    code = TRAINER_START - TRAINER_IMPORTS if runtime is None or start is None else max(0, start - runtime)
    first = TRAINER_STEP + int(_RUN_AGAIN * code) + compiled
    terms = [
        Term("runtime", TRAINER_IMPORTS if runtime is None else runtime, "measured before its first step", "trainer"),
        Term(
            "first step",
            first,
            "10 MiB + 65 % of the code that importing ran, measured; in bfloat16 34 MiB more, with AMX 56",
            "trainer",
        ),
        Term("block weights", weights, weights_formula, "trainer", "lower adapt.blocks"),
        Term("head, dequantised part", F32 * part * arch.n_embd, "1.2 M weights x 4 B", "trainer"),
        Term(
            "logits of a part",
            3 * F32 * part * rows,
            "3 x scored positions of a micro-batch x vocabulary rows of a part (1.2 M / D) x 4 B",
            "trainer",
            "shorter answers (scored positions) take less",
        ),
        Term(
            "LoRA and AdamW",
            F32 * workload.rank * state,
            f"{state_formula} x rank x sum(inputs + outputs) x 4 B",
            "trainer",
            "lower adapt.rank",
        ),
        Term(
            "activations",
            F32 * floats,
            f"{formula} x 4 B; rows = tokens of a micro-batch, at least one example with all its answers",
            "trainer",
            "lower adapt.blocks, or shorten the examples",
        ),
        Term(
            "activations of the last block",
            F32 * last,
            f"rows x (2 D + {3 + outputs} H d) x 4 B",
            "trainer",
            "shorten the examples",
        ),
        Term(
            "gradients of activations",
            F32 * backward,
            "rows x (5 D + 4 n_ff) x 4 B" if wide else "rows x 5 D x 4 B",
            "trainer",
            "shorten the examples",
        ),
        _examples(workload, "trainer"),
        Term(
            "attention mask",
            _MASK * tokens * tokens,
            "5 B (truth values, and the same as numbers) x rows x rows",
            "trainer",
            "shorten the examples",
        ),
        Term(
            "allocator",
            holes,
            "35 % of up to 64 MiB of activations and gradients, 44 % of the rest"
            + ("" if one else ", and 8 MiB that several steps leave behind"),
            "trainer",
        ),
    ]
    more = int(_START_MARGIN * (TRAINER_START if start is None else start)) - total(terms)
    if more > 0:
        terms.append(Term("start", more, "what importing takes beyond all this, before it is handed back", "trainer"))
    return terms


def _examples(workload: Workload, process: str) -> Term:
    each = _EXAMPLE[process]
    tokens = workload.tokens + workload.examples * workload.prefix
    terms = workload.examples * max(workload.scored, workload.terms)
    size = workload.examples * each + _TOKEN * tokens + _TERM * terms
    formula = f"{each} B + {_TOKEN} B a token + {_TERM} B a term"
    return Term("examples", size, f"{formula}, as Python objects", process, "lower adapt.max_examples")
