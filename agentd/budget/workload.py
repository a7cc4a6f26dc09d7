"""What a pass works on: the sizes that its memory and its time depend on, and the pieces the trainer takes it in."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from agentd.budget.model_shapes import F32, ModelShapes
from agentd.limits import BACKGROUND_CONTEXT, MICRO_LEAST, MICRO_MOST, ROW_STEP

MICRO_BUDGET = 144 << 20  # bytes a micro-batch of the trainer may keep for its backward pass, about

_TEMPLATE = 24  # tokens that a chat template adds to a message
_MANY_TOKENS, _TOKENS, _FEW_TOKENS = 3.0, 4.2, 6.0  # characters per token: at worst, in English, at best


@dataclass(frozen=True)
class Workload:
    """What a pass works on. Tokens are counted without the prefix that all examples share.

    seq_len         tokens of the largest example, all its answers included; what these share counts once
    shortest        tokens of the smallest example, counted likewise; 0: not known
    tokens          tokens of all examples together, counted likewise, those of the holdout included
    examples        number of examples, holdout included
    scored          positions that are scored in an example at most: those of the choices' terms and of the target
    terms           log-likelihoods of an example at most, several of which may be at one position; 0: as many
    rows            positions that are scored in all examples together; 0: as many in each as there are at most
    holdout_tokens  those of `tokens` that only the gate sees; 0: about a fifth
    micro_tokens    tokens in one forward pass of the trainer, padding and prefix included; 0: what `micro_tokens` says
    checkpoint      the trainer keeps one block in memory at a time
    bf16            the trainer multiplies matrices in bfloat16
    answer_tokens   those of the answers that the gate has generated, by one model, and the `answer_seconds` that it has
    probe_tokens    of the probes of skills, which the gate scores
    trial_seconds   for which a new revision is on trial
    texts           most answers are texts or calls of tools, not choices
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
    terms: int = 0
    holdout_tokens: int = 0
    bf16: bool = False
    answer_tokens: int = 0
    answer_seconds: float = 0.0
    probe_tokens: int = 0
    texts: bool = False
    shortest: int = 0
    trial_seconds: float = 60.0
    rows: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the largest example with the shared prefix."""
        return self.prefix + self.seq_len

    @property
    def mean(self) -> float:
        """Tokens of an example."""
        return max(1.0, self.tokens / max(1, self.examples))

    @property
    def scored_rows(self) -> int:
        """Positions that are scored, of all examples together."""
        return self.rows or self.examples * self.scored

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def estimated(
        cls,
        inputs: Sequence[str],
        answers: Sequence[Collection[str]] = (),
        *,
        rank: int = 8,
        context: int = BACKGROUND_CONTEXT,
    ) -> "Workload":
        """From the texts of the inputs and, per input, of all answers told apart or trained on, before anything is
        tokenised.

        What sizes depend on (the longest sequence and answer) is taken high, so that the footprint is not too small;
        `tokens`, which seconds depend on, as it is for English.
        """
        ends = (min(inputs), max(inputs)) if inputs else ("", "")
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
        counts = {each: [int(len(text) / _MANY_TOKENS) for text in each] for each in map(frozenset, answers)}
        # An answer's first token is scored where the text ends, and its last one is never fed; the end of turn is both.
        answer = max((sum(n) + 1 for n in counts.values()), default=1)
        longest = int(max(map(len, inputs), default=0) / _MANY_TOKENS) + _TEMPLATE + answer
        longest = min(longest, context, BACKGROUND_CONTEXT)  # what is longer is left out
        prefix = min(longest - 1, int(shared / _FEW_TOKENS))
        own = sum(len(text) - shared for text in inputs) + sum(len(text) for each in answers for text in set(each))
        return cls(
            seq_len=longest - prefix,
            tokens=int(own / _TOKENS) + len(inputs),
            examples=len(inputs),
            rank=rank,
            prefix=prefix,
            scored=answer + 1,
            terms=max((sum(n) + len(n) for n in counts.values()), default=0) + answer + 1,
            context=context,
            rows=sum(int(sum(map(len, set(each))) / _TOKENS) + 1 for each in answers),
            texts=2 * sum(len(each) == 1 for each in answers) > len(answers),
        )


def micro_tokens(arch: ModelShapes, k: int, checkpoint: bool = False, small: bool = False, prefix: int = 0) -> int:
    """Tokens in one forward pass of the trainer when it trains the last `k` blocks, padding and `prefix` included.

    Small enough that the activations kept for the backward pass stay near `MICRO_BUDGET`, large enough to keep matrix
    kernels busy and to go through the vocabulary seldom. The last block keeps next to nothing, because it runs where it
    is scored; with checkpointing one block is kept at a time. `small`: no more than is needed to keep the kernels busy.
    """
    width = max(arch.n_ff, 4 * arch.n_embd)
    whole = 1 if checkpoint else max(1, k - 1)
    most = MICRO_LEAST if small else MICRO_MOST
    fitting = MICRO_BUDGET // (F32 * 4 * width * whole) // ROW_STEP * ROW_STEP
    usual = max(MICRO_LEAST, min(most, fitting))
    if small or 2 * prefix <= usual:
        return usual
    # Every forward pass computes the prefix again (an agent's tools, say): it is to do so for as much as it is itself.
    return -(-2 * prefix // ROW_STEP) * ROW_STEP


def forward_passes(workload: Workload, micro: int) -> int:
    """Of one epoch, of at most `micro` tokens each; 0: not known."""
    if not micro:
        return 0
    together = max(1, min(workload.batch, int((micro - workload.prefix) / workload.mean)))
    steps, left = divmod(workload.examples, workload.batch)
    return steps * -(-workload.batch // together) + -(-left // together)


def computed_tokens(workload: Workload, micro: int) -> int:
    """Tokens of one epoch with those of the prefix, in forward passes of at most `micro` tokens; 0: not known."""
    return workload.tokens + forward_passes(workload, micro) * workload.prefix


def micro_batch(arch: ModelShapes, workload: Workload, k: int, one: bool = False) -> tuple[int, int]:
    """(rows, examples) of the trainer's largest forward pass: what it allows itself, or all there is in a batch, but at
    least one example with all its answers.

    The shared prefix is computed once. `one`: one block is in memory at a time.
    """
    allowed = workload.micro_tokens or micro_tokens(arch, k, one, prefix=workload.prefix)
    n = max(1, workload.seq_len)
    # Examples that are nearly as long as one another may leave much of what is allowed empty.
    fitting = (allowed - workload.prefix) // workload.shortest if workload.shortest else workload.batch
    rows = max(workload.prefix + n, min(allowed, workload.prefix + min(workload.batch, fitting) * n))
    return rows, max(1, min(workload.batch, int((rows - workload.prefix) / workload.mean)))
