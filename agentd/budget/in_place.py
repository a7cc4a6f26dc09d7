"""What engine transformers allocates for a pass on its own weights, and how its model is looked at. Sizes in bytes.

The candidate is a second set of weights, of which every page that an update has written is memory of the engine. The
pages of the committed weights belong to a file: a pass gives them back, and a request takes them again from the page
cache. Kernels count such pages as available, so the candidate is what a pass takes of the memory there is; the engine's
size grows by it only while requests are answered in the middle of the pass (docs/transformers.md has the
measurements).
"""

from agentd.budget.architecture import F16, F32, Architecture
from agentd.budget.footprint import MIB, Term, Workload
from agentd.checkpoint_header import CheckpointHeader
from agentd.gguf_header import Header
from agentd.processor import multiplies_bf16

LOSS_TOKENS = 1024  # of a forward, see engine/transformers/background.py
_ROWS = 64  # scored rows come in multiples of it
_RUNTIME = 48 * MIB  # measured: code paged in, kernels compiled for new shapes, allocator
_SCRATCH = 1 << 20  # perturbed weights made at a time, see learn/weights/perturbation.py


def architecture(header: Header | CheckpointHeader, dtype: str) -> Architecture:
    """The model's shapes as the engine transformers serves them."""
    if isinstance(header, Header):
        return Architecture.from_header(header).served(itemsize(dtype))
    return Architecture.from_checkpoint(header).served(itemsize(dtype))


def itemsize(dtype: str) -> int:
    """Bytes of a weight as it is served with this `model.dtype`."""
    if dtype == "auto":
        return F16 if multiplies_bf16() else F32
    return F16 if dtype == "bfloat16" else F32


def engine_terms(arch: Architecture, workload: Workload, runtime: int | None = None) -> list[Term]:
    """What the engine takes for zeroth-order steps on all weights, scoring included."""
    size = arch.block_bytes[0] // max(1, arch.block_parameters[0]) if arch.block_parameters else F32
    step = workload.prefix + workload.batch * workload.sequences * workload.seq_len
    tokens = max(min(LOSS_TOKENS, step), workload.longest)
    rows = -(-workload.batch * workload.scored * workload.sequences // _ROWS) * _ROWS
    attention = arch.n_head * arch.head_dim
    return [
        Term("runtime", _RUNTIME if runtime is None else runtime, "measured"),
        Term(
            "candidate weights",
            arch.weight_bytes,
            f"parameters x {size} B; serving's own pages can be had again from their file",
        ),
        Term(
            "activations",
            tokens * (size * (6 * arch.n_embd + 4 * attention + 3 * arch.n_ff) + tokens),
            f"tokens of a loss x ((6 D + 4 H d + 3 n_ff) x {size} B + tokens, the mask); no backward",
            reduce="shorten the examples",
        ),
        Term(
            "logits",
            rows * arch.n_vocab * (size + 2 * F32),
            f"scored rows, in steps of 64, x V x ({size} + 8) B",
            reduce="shorter answers (scored positions) take less",
        ),
        Term("perturbed weights", 3 * F32 * _SCRATCH, "3 x 2^20 x 4 B: a piece of one matrix, its signs, their sum"),
    ]
