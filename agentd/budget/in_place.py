"""What engine transformers allocates for a pass on its own weights, and how its model is looked at. Sizes in bytes.

The candidate is a second set of weights, of which every page that an update has written is memory of the engine: all
of them with zeroth-order steps, those of the last blocks where only these learn. The
pages of the committed weights belong to a file: a pass gives them back, and a request takes them again from the page
cache. Kernels count such pages as available, so the candidate is what a pass takes of the memory there is; the engine's
size grows by it only while requests are answered in the middle of the pass (docs/transformers.md has the
measurements). Low-rank changes leave the weights as they are, and need no candidate: a file is written at the end.
"""

from agentd.budget.footprint import MIB, Term
from agentd.budget.model_shapes import F16, F32, ModelShapes
from agentd.budget.workload import Workload
from agentd.formats.checkpoint_header import CheckpointHeader
from agentd.formats.gguf_header import Header
from agentd.host.cpu import multiplies_bf16
from agentd.limits import GRADIENT_ROWS, JOINT_ROWS, LOSS_TOKENS, PERTURBED_PIECE, PRODUCT_ROWS, joint_rows
from agentd.methods import CHANGES, FORWARD_ONLY

_RUNTIME = 48 * MIB  # measured: code paged in, kernels compiled for new shapes, allocator
_JOINT_CODE = 5 * MIB  # measured
_BACKWARD = {F16: 64 * MIB, F32: 16 * MIB}  # measured: autograd's code; oneDNN's for every number of tokens it meets


def served_shapes(header: Header | CheckpointHeader, dtype: str) -> ModelShapes:
    """The model's shapes as the engine transformers serves them."""
    if isinstance(header, Header):
        return ModelShapes.from_header(header).served(itemsize(dtype))
    return ModelShapes.from_checkpoint(header).served(itemsize(dtype))


def itemsize(dtype: str) -> int:
    """Bytes of a weight as it is served with this `model.dtype`."""
    if dtype == "auto":
        return F16 if multiplies_bf16() else F32
    return F16 if dtype == "bfloat16" else F32


def engine_terms(
    arch: ModelShapes, workload: Workload, method: str, blocks: int = 0, *, runtime: int | None = None
) -> list[Term]:
    """What the engine takes for steps on its own weights, or on low-rank changes beside them, scoring included:
    backpropagation in the last `blocks`, zeroth-order steps in the rest or in everything."""
    zeroth_order, changes = method not in ("bp", "lora"), method in CHANGES
    size = arch.block_bytes[0] // max(1, arch.block_parameters[0]) if arch.block_parameters else F32
    step = workload.prefix + workload.batch * workload.seq_len
    tokens = max(min(max(LOSS_TOKENS, 2 * workload.prefix), step), workload.longest)
    tokens += -tokens % (GRADIENT_ROWS if blocks and size == F16 else PRODUCT_ROWS)
    rows = -(-workload.batch * workload.scored // PRODUCT_ROWS) * PRODUCT_ROWS
    attention = arch.n_head * arch.head_dim
    trained = _trained_bytes(arch, blocks)
    table = size * arch.n_vocab * arch.n_embd
    terms = [Term("runtime", _RUNTIME if runtime is None else runtime, "measured")]
    if changes:
        copies, kinds = (1, "values") if zeroth_order else (4, "values, gradients, AdamW's two moments")
        formula = f"rank x (inputs + outputs) of all matrices x 4 B x {copies}: {kinds}"
        parameters = workload.rank * sum(arch.lora_width)
        terms.append(Term("low-rank changes", copies * F32 * parameters, formula, reduce="lower adapt.rank"))
    else:
        formula = (
            f"{'' if zeroth_order else 'trained '}parameters x {size} B; serving's own can be had again from a file"
        )
        terms.append(Term("candidate weights", arch.weight_bytes if zeroth_order else trained, formula))
    terms += [
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
    ]
    if zeroth_order and not changes:
        formula = "3 x 2^20 x 4 B: a piece of one matrix, its signs, their sum"
        terms.append(Term("perturbed weights", 3 * F32 * PERTURBED_PIECE, formula))
    if method in FORWARD_ONLY:
        return terms
    activations = tokens * (2 * 3 * F32 * arch.n_embd + size * (8 * arch.n_embd + 8 * attention + 6 * arch.n_ff))
    at_once = 1 if blocks > 1 else blocks
    terms += [
        Term("backward", _BACKWARD[F16 if size == F16 else F32], "measured"),
        Term(
            "gradients",
            0 if changes else trained,
            "with the changes" if changes else f"trained parameters x {size} B",
        ),
        Term(
            "kept activations",
            at_once * activations + blocks * tokens * arch.n_embd * size,
            f"tokens x (24 D + (8 D + 8 H d + 6 n_ff) x {size}) B of one block, k x tokens x D x {size} B of inputs",
            reduce="shorten the examples",
        ),
        Term(
            "attention",
            2 * tokens * tokens * size,
            f"2 x tokens^2 x {size} B: the mask as numbers, forward and backward; scores are never held as a whole",
            reduce="shorten the examples",
        ),
        Term("gradient of logits", rows * arch.n_vocab * (size + F32), f"scored rows x V x ({size} + 4) B"),
    ]
    if method == "elasticzo" and arch.tied:
        terms.append(Term("perturbed head", table, f"V x D x {size} B: the gradient goes back through it"))
    return terms


def joint_bytes(arch: ModelShapes, slots: int) -> int:
    """What serving takes where the next tokens of all slots share a forward: their logits, which the head makes and
    which are float32 afterwards, and in bfloat16 oneDNN's code for every number of rows. Keys and values are in the
    slots' caches anyway, and a forward has no more tokens than a piece of a prompt."""
    size = arch.block_bytes[0] // max(1, arch.block_parameters[0]) if arch.block_parameters else F32
    rows = joint_rows(slots)
    code = _JOINT_CODE * (rows // JOINT_ROWS).bit_length() if size == F16 else 0
    return rows * arch.n_vocab * (size + F32) + code


def _trained_bytes(arch: ModelShapes, blocks: int) -> int:
    """Of the weights that backpropagation moves: the last blocks', the final norm's, and those of a head of its own; in
    all blocks everything."""
    if not blocks:
        return 0
    if blocks >= arch.n_layer:
        return arch.weight_bytes
    return sum(arch.block_bytes[-blocks:]) + F32 * arch.n_embd + arch.head_bytes
