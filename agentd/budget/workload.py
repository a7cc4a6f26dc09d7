"""What a pass works on: the sizes that its memory and its time depend on, and the pieces the trainer takes it in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from agentd.budget.architecture import F32, Architecture

BACKGROUND_CONTEXT = 2048  # tokens of the longest example, unless model.context is less
MICRO_BUDGET = 144 << 20  # bytes a micro-batch of the trainer may keep for its backward pass, about
MICRO_LEAST, MICRO_MOST = 128, 384  # tokens of a micro-batch
_MICRO_STEP = 32  # a multiple of it: rows are rounded up to such numbers where they are multiplied

_TEMPLATE = 24  # tokens that a chat template adds to a message
_MANY_TOKENS, _TOKENS, _FEW_TOKENS = 3.0, 4.2, 6.0  # characters per token: at worst, in English, at best


@dataclass(frozen=True)
class Workload:
    """What a pass works on. Tokens are counted without the prefix that all sequences share.

    seq_len         tokens of the longest sequence
    tokens          tokens of all sequences together, those of the holdout included
    examples        number of examples, holdout included
    scored          scored positions per sequence: those of the choices' terms and of the target
    sequences       sequences per example: 1, or one per choice where choices have several tokens
    holdout_tokens  those of `tokens` that only the gate sees; 0: about a fifth
    micro_tokens    tokens in one forward pass of the trainer, padding and prefix included; 0: what `micro_tokens` says
    checkpoint      the trainer keeps one block in memory at a time
    bf16            the trainer multiplies matrices in bfloat16
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
    sequences: int = 1
    holdout_tokens: int = 0
    bf16: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence with the shared prefix."""
        return self.prefix + self.seq_len

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def estimated(
        cls, inputs: Sequence[str], answers: Sequence[str] = (), *, rank: int = 8, context: int = BACKGROUND_CONTEXT
    ) -> "Workload":
        """From the texts of the inputs and of the answers trained on, before anything is tokenised.

        What sizes depend on (the longest sequence and answer) is taken high, so that the footprint is not too small;
        `tokens`, which seconds depend on, as it is for English.
        """
        ends = (min(inputs), max(inputs)) if inputs else ("", "")
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
        answer = max((int(len(text) / _MANY_TOKENS) + 1 for text in answers), default=1)
        longest = int(max(map(len, inputs), default=0) / _MANY_TOKENS) + _TEMPLATE + answer
        longest = min(longest, context, BACKGROUND_CONTEXT)  # what is longer is left out
        prefix = min(longest - 1, int(shared / _FEW_TOKENS))
        own = sum(len(text) - shared for text in inputs) + sum(map(len, answers))
        return cls(
            seq_len=longest - prefix,
            tokens=int(own / _TOKENS) + len(inputs),
            examples=len(inputs),
            rank=rank,
            prefix=prefix,
            scored=answer + 1,
            context=context,
        )


def micro_tokens(arch: Architecture, k: int, checkpoint: bool = False, small: bool = False) -> int:
    """Tokens in one forward pass of the trainer when it trains the last `k` blocks, padding and prefix included.

    Small enough that the activations kept for the backward pass stay near `MICRO_BUDGET`, large enough to keep matrix
    kernels busy and to go through the vocabulary seldom. The last block keeps next to nothing, because it runs where it
    is scored; with checkpointing one block is kept at a time. `small`: no more than is needed to keep the kernels busy.
    """
    width = max(arch.n_ff, 4 * arch.n_embd)
    whole = 1 if checkpoint else max(1, k - 1)
    most = MICRO_LEAST if small else MICRO_MOST
    fitting = MICRO_BUDGET // (F32 * 4 * width * whole) // _MICRO_STEP * _MICRO_STEP
    return max(MICRO_LEAST, min(most, fitting))


def micro_batch(arch: Architecture, workload: Workload, k: int, one: bool = False) -> tuple[int, int]:
    """(rows, sequences) of the trainer's largest forward pass: what it allows itself, or all there is in a batch.

    The shared prefix is computed once for all sequences. `one`: one block is in memory at a time.
    """
    allowed = workload.micro_tokens or micro_tokens(arch, k, one)
    n = max(1, workload.seq_len)
    rows = max(
        workload.prefix + workload.sequences * n,
        min(allowed, workload.prefix + workload.batch * workload.sequences * n),
    )
    return rows, max(1, (rows - workload.prefix) // n)
