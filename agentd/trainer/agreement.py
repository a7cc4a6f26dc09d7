"""Whether torch computes what the engine computes: each block on a few tokens, and what the head makes of them.

The engine's tap has what enters every block. A block runs here on what entered it there, and its output is compared
with what entered the next; the last block and the head are compared by the likelihoods of some answers. What is built
of a file by rules is trusted no further than that: blocks up to the last one that disagrees are not trained.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentd.errors import TrainerFailed
from agentd.learn.encoded import Encoded
from agentd.nn.blocks import Blocks
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.head import Head
from agentd.nn.vjp import vjp
from agentd.trainer.batches import Batch, Example, Layout
from agentd.trainer.tap_file import TapFile

_TIMED = 128  # tokens that a block is timed with
AGREES = 0.99
"""The least cosine. The engine rounds activations to 8 bits, which costs a few thousandths at most."""


@dataclass(frozen=True)
class Agreement:
    """Cosines by block, of what the block adds to its input; for the last block that of the answers' likelihoods.

    forward   tokens per second through the last block, forward alone
    backward  the same, forward and backward
    """

    cosines: tuple[float, ...]
    forward: float = 0.0
    backward: float = 0.0

    @property
    def first(self) -> int:
        """The lowest block from which on all agree: the number of blocks where the last one does not."""
        wrong = [i for i, cosine in enumerate(self.cosines) if not cosine >= AGREES]
        return wrong[-1] + 1 if wrong else 0

    @property
    def reason(self) -> str | None:
        """Which block disagrees, in words; None where none does."""
        if not self.first:
            return None
        wrong, last = self.first - 1, len(self.cosines) - 1
        what = f"block {wrong}" if wrong < last else f"block {wrong}, the last one, or the head"
        return f"torch and the engine compute different things in {what} (cosine {self.cosines[wrong]:.3f})"


def compare(file: GGUFFile, sample: Path) -> Agreement:
    """`sample` is the JSON file of adapt/planning/engine_sample.py.

    Raises Unsupported where blocks cannot be built, TrainerFailed for a sample that does not fit.
    """
    tree: dict[str, Any] = json.loads(sample.read_text(encoding="utf-8"))
    example = Example(0, Encoded.from_json(tree["encoded"]))
    n = file.header.block_count
    blocks = Blocks(file, 0, n, in_memory=False)
    layout = Layout(int(tree["prefix"]), {0: int(tree["start"])})
    tap = TapFile(Path(tree["tap"]), blocks.n_embd, layout, planes=blocks.n_blocks)
    batch = Batch([example], layout.prefix, together=False)
    cosines = []
    with torch.no_grad():
        for block in range(blocks.n_blocks):
            blocks.activate(block)
            entered = tap.inputs(batch, block)
            # some blocks change their input in place
            left = blocks.run(entered.clone())
            if block + 1 < blocks.n_blocks:
                cosines.append(_of_changes(batch, entered, left, tap.inputs(batch, block + 1)))
        terms = [*(term for choice in example.encoded.choices for term in choice), *example.encoded.target]
        width = batch.shape[1]
        rows = torch.tensor([sequence * width + position for sequence, position, _ in terms])
        tokens = torch.tensor([token for _, _, token in terms])
        ours = Head(blocks).log_likelihoods(left.flatten(0, 1), rows, tokens).tolist()
    cosines.append(_of_answers(example.encoded, ours, tree["choices"], tree["target"]))
    return Agreement(tuple(cosines), *_speeds(blocks))


def _speeds(blocks: Blocks) -> tuple[float, float]:
    """Tokens per second of the block that is in memory: forward, and forward and backward."""
    states = torch.randn(1, _TIMED, blocks.n_embd, generator=torch.Generator().manual_seed(0))

    def seconds(backward: bool) -> float:
        begin = time.monotonic()
        out = blocks.run(states.clone().requires_grad_(backward))
        if backward:
            torch.autograd.backward(vjp([(out, states)]))
        return time.monotonic() - begin

    with torch.no_grad():
        forward = [seconds(False) for _ in range(3)]
    both = [seconds(True) for _ in range(3)]
    return _TIMED / max(min(forward), 1e-6), _TIMED / max(min(both), 1e-6)


def _of_changes(batch: Batch, entered: torch.Tensor, left: torch.Tensor, expected: torch.Tensor) -> float:
    """The lower quartile over tokens: some have states so large that they would speak for all, and where experts are
    chosen, a rounded activation chooses another one for some."""
    there = torch.zeros(batch.shape, dtype=torch.bool)
    for piece in batch.pieces():
        there[piece.sequence, piece.position : piece.position + piece.n] = True
    ours, theirs = (left - entered)[there], (expected - entered)[there]
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).quantile(0.25))


def _of_answers(encoded: Encoded, terms: Sequence[float], choices: Sequence[float], target: Sequence[float]) -> float:
    """Of the likelihoods of all choices and of the target's tokens, less their mean."""
    values, ours = iter(terms), []
    for choice in encoded.choices:
        ours.append(math.fsum(next(values) for _ in choice))
    ours += values
    theirs = [*choices, *target]
    if len(ours) != len(theirs) or len(ours) < 2:  # of one value nothing is left without its mean
        raise TrainerFailed(f"the sample has {len(theirs)} likelihoods where {len(ours)} belong")
    a, b = torch.tensor(ours), torch.tensor(theirs)
    return float(torch.nn.functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=0))
