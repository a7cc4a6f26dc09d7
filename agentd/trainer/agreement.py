"""Whether torch computes what the engine computes: each block on a few tokens, and what the head makes of them.

The engine's tap has what enters every block. A block runs here on what entered it there, and its output is compared
with what entered the next; the last block and the head are compared by the likelihoods of some answers. What is built
of a file by rules is trusted no further than that: blocks up to the last one that disagrees are not trained.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agentd.budget.model_shapes import F32
from agentd.errors import TrainerFailed
from agentd.host.cpu import multiplies_bf16
from agentd.learn.encoded import Encoded
from agentd.limits import ONE_BLOCK_BYTES
from agentd.nn.blocks import Blocks
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.head import Head
from agentd.nn.lora_blocks import attach
from agentd.nn.matrix import Matrix
from agentd.nn.vjp import vjp
from agentd.trainer.batches import Batch, Example, Layout
from agentd.trainer.tap_file import TapFile

_RANK = 8  # of the LoRA that is timed with it
_TIMED = 256  # tokens that a block is timed with
_TRIES, _FOR = 3, 0.5  # times at least, and seconds of them
AGREES = 0.99
"""The least cosine. The engine rounds activations to 8 bits, which costs a few thousandths at most."""


@dataclass(frozen=True)
class Agreement:
    """Cosines by block, of what the block adds to its input; for the last block that of the answers' likelihoods.

    speeds  as the trainer's answer has them: "trunk" and "backward", tokens per second through the last block forward,
            and forward and backward; "load", weights per second out of the file
    """

    cosines: tuple[float, ...]
    speeds: Mapping[str, float] = field(default_factory=dict)

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
    parameters = max(sum(math.prod(file.shape(t)) for t in file.tensors if t.startswith(f"blk.{i}.")) for i in range(n))
    streamed = F32 * parameters > ONE_BLOCK_BYTES
    blocks = Blocks(file, 0, n, in_memory=False, streamed=streamed)
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
    del blocks, left
    return Agreement(tuple(cosines), _speeds(file, streamed))


def _speeds(file: GGUFFile, streamed: bool) -> dict[str, float]:
    """Of the last block in the type in which this processor trains, its matrices in memory as far as they are then.

    Where they are not, what it takes to make them is taken off: plans have that in a term of its own.
    """
    n, dtype = file.header.block_count, torch.bfloat16 if multiplies_bf16() else torch.float32
    blocks = Blocks(file, n - 1, n, dtype=dtype, streamed=streamed)
    attach(blocks, _RANK, 2.0 * _RANK, 0, None)
    states = torch.randn(1, _TIMED, blocks.n_embd, generator=torch.Generator().manual_seed(0))
    largest = max((Matrix(file, tensor, dtype) for tensor in blocks.linears), key=lambda each: math.prod(each.shape))
    weights = sum(math.prod(file.shape(tensor)) for tensor in blocks.linears)

    def load() -> None:
        for _ in largest.parts():
            pass

    def forward() -> None:
        with torch.no_grad():
            blocks.run(states.clone())

    def backward() -> None:
        out = blocks.run(states.clone().requires_grad_())
        torch.autograd.backward(vjp([(out, states)]))

    rate = math.prod(largest.shape) / _seconds(load)
    made = weights / rate if streamed else 0.0
    trunk, both = _seconds(forward) - made, _seconds(backward) - 2 * made
    return {"trunk": _TIMED / max(trunk, made, 1e-6), "backward": _TIMED / max(both, made, 1e-6), "load": rate}


def _seconds(what: Callable[[], None]) -> float:
    """The least of several times: other work only ever makes it longer, and is there most of the time, not all."""
    times: list[float] = []
    while len(times) < _TRIES or sum(times) < _FOR:
        begin = time.monotonic()
        what()
        times.append(time.monotonic() - begin)
    return max(min(times), 1e-6)


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
