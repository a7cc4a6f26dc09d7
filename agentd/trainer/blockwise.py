"""Backpropagation with one block in memory at a time: exact gradients in any number of blocks, at the memory of one.

A step needs the input of every trained block; those are its checkpoints. They come from the engine, which runs the
batch through the quantised model with the adapter as it stands and taps them into a file; or, where few blocks are
trained on a frozen trunk, from this process, which runs the blocks on trunk states that were tapped once.

From the last block down: dequantise the block, compute it again from its input with autograd, backpropagate, update
its matrices, go on with the gradient at its input. What is above has no further use for a block's matrices, so they
can be updated at once, and gradients are there for one block at a time.

After MeBP (arXiv 2510.03425): checkpoints, lazily decompressed weights and mapped activations.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from agentd.errors import TrainerFailed
from agentd.nn.adamw import AdamW
from agentd.nn.lora_blocks import block_of
from agentd.nn.vjp import vjp
from agentd.trainer.batches import Batch, Example, Layout
from agentd.trainer.learner import Learner, Score, finite
from agentd.trainer.spec import Spec
from agentd.trainer.tap_file import TapFile

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Asks the daemon for something that the engine computes, and waits for the answer."""


class Checkpoints(ABC):
    """The inputs of every trained block for one step's micro-batches."""

    batches: list[Batch]

    @abstractmethod
    def inputs(self, block: int, j: int) -> torch.Tensor:
        """(rows, tokens, n_embd) of micro-batch j."""


class Blockwise(Learner):
    """One block at a time. `ask` is needed where the specification says that the engine gives the checkpoints."""

    def __init__(self, spec: Spec, ask: Ask | None = None) -> None:
        super().__init__(spec, in_memory=False)
        self._ask = ask
        by_block: dict[int, list[torch.Tensor]] = {i: [] for i in range(spec.first_block, spec.end_block)}
        for name, layer in self.lora.items():
            by_block[block_of(name)] += [layer.a, layer.b]
        self.by_block = {i: AdamW(matrices, spec.options.weight_decay) for i, matrices in by_block.items()}
        self._trunk = None if spec.states == "asked" else self.open_tap()
        if self._trunk is None and ask is None:
            raise TrainerFailed("the checkpoints are the engine's to give, and there is no one to ask")

    @property
    def optimizers(self) -> list[AdamW]:
        return list(self.by_block.values())

    @property
    def range(self) -> range:
        return range(self.spec.first_block, self.spec.end_block)

    def step(self, part: Sequence[Example], lr: float) -> float:
        return self.backward(self.checkpoints(part), 1 / len(part), lambda block: self.by_block[block].apply(lr))

    def evaluate(self, examples: Sequence[Example]) -> Score:
        if self._trunk:
            results: list[tuple[float, bool | None]] = []
            size = self.spec.options.batch
            for begin in range(0, len(examples), size):
                at = _Computed(self, self._trunk, examples[begin : begin + size])
                last = self.range[-1]
                self.blocks.activate(last)
                for j, batch in enumerate(at.batches):
                    results += self.losses(batch, at.inputs(last, j))
            return Score.mean(results)
        answer = self.ask("score", examples)
        pairs = zip(examples, answer["scores"], strict=True)
        return Score.mean([self.judged(example, scores["choices"], scores["target"]) for example, scores in pairs])

    def checkpoints(self, part: Sequence[Example]) -> Checkpoints:
        if self._trunk:
            return _Computed(self, self._trunk, part)
        answer = self.ask("tap", part, first=self.range[0], end=self.range[-1] + 1, path=str(self.spec.tap))
        return _Tapped(self, part, answer)

    def ask(self, what: str, examples: Sequence[Example], **more: Any) -> dict[str, Any]:
        """What the engine says of examples, computed with the matrices as they are now."""
        assert self._ask is not None
        adapter = self.spec.output.with_name("step.gguf")
        self.write(adapter, durable=False)
        numbers = [example.number for example in examples]
        return self._ask({"ask": what, "adapter": str(adapter), "examples": numbers, **more})

    def backward(self, at: Checkpoints, weight: float, done: Callable[[int], None] = lambda block: None) -> float:
        """Leaves the gradient of weight * sum of losses in a block's matrices, calls `done` with the block, goes on.

        Returns the mean loss.
        """
        above: list[torch.Tensor] = []  # d loss / d output of the block, per micro-batch
        results: list[tuple[float, bool | None]] = []
        for block in reversed(self.range):
            self.blocks.activate(block)
            is_first = block == self.range[0]
            below: list[torch.Tensor] = []
            for j, batch in enumerate(at.batches):
                inputs = at.inputs(block, j).requires_grad_(not is_first)
                if block == self.range[-1]:
                    results += self.losses(batch, inputs, weight)
                else:
                    outputs = self.suffix.all_rows(inputs, batch.tree)
                    torch.autograd.backward(vjp([(outputs, above[j])]))
                    del outputs  # and what it keeps, before the next micro-batch runs
                if not is_first:
                    below.append(_grad(inputs))
            above = below
            if block == self.range[-1]:
                loss = finite(results, len(results))
            done(block)
        return loss


class _Tapped(Checkpoints):
    """What the engine wrote: a plane of rows for each block."""

    def __init__(self, learner: Blockwise, part: Sequence[Example], answer: dict[str, Any]) -> None:
        numbers, planes = [example.number for example in part], len(learner.range)
        layout = Layout(int(answer["prefix_rows"]), dict(zip(numbers, map(int, answer["starts"]), strict=True)))
        self._tap, self._first = (
            TapFile(learner.spec.tap, learner.blocks.n_embd, layout, planes=planes),
            learner.range[0],
        )
        self._tap.check(part)
        self.batches = learner.batches(part, layout.prefix)

    def inputs(self, block: int, j: int) -> torch.Tensor:
        return self._tap.inputs(self.batches[j], block - self._first)


class _Computed(Checkpoints):
    """Run from the trunk's states, block by block, without anything kept but what enters a block."""

    def __init__(self, learner: Blockwise, trunk: TapFile, part: Sequence[Example]) -> None:
        first, last = learner.range[0], learner.range[-1]
        self.batches = learner.batches(part, learner.spec.prefix)
        self._inputs = {first: [trunk.inputs(batch) for batch in self.batches]}
        with torch.no_grad():
            for block in range(first, last):
                learner.blocks.activate(block)
                pairs = zip(self._inputs[block], self.batches, strict=True)
                self._inputs[block + 1] = [learner.suffix.all_rows(x, batch.tree) for x, batch in pairs]

    def inputs(self, block: int, j: int) -> torch.Tensor:
        return self._inputs[block][j].detach()


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
