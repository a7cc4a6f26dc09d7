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
from dataclasses import replace
from typing import Any

import torch

from agentd.errors import TrainerFailed
from agentd.learn.objectives import objective
from agentd.learn.slopes import sloped
from agentd.trainer.adamw import AdamW
from agentd.trainer.learner import Learner, Score, finite
from agentd.trainer.lora import block_of
from agentd.trainer.spec import Example, Rows, Spec
from agentd.trainer.tap import Batch, Tap, batches

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Asks the daemon for something that the engine computes, and waits for the answer."""


class Checkpoints(ABC):
    """The inputs of every trained block for one step's micro-batches."""

    batches: list[Batch]

    @abstractmethod
    def prefix(self, block: int) -> torch.Tensor:
        """(1, rows, n_embd), what all sequences begin with."""

    @abstractmethod
    def inputs(self, block: int, j: int) -> torch.Tensor:
        """(sequences, tokens, n_embd) of micro-batch j."""


class Blockwise(Learner):
    """One block at a time. `ask` is needed where the specification says that the engine gives the checkpoints."""

    def __init__(self, spec: Spec, ask: Ask | None = None) -> None:
        super().__init__(spec, resident=False)
        self._ask = ask
        self.micro = spec.train.micro_tokens
        by_block: dict[int, list[torch.Tensor]] = {i: [] for i in range(spec.first_block, spec.end_block)}
        for name, layer in self.lora.items():
            by_block[block_of(name)] += [layer.a, layer.b]
        self.optimizers = {i: AdamW(matrices, spec.train.weight_decay) for i, matrices in by_block.items()}
        self._trunk = None if spec.from_engine else Tap(spec.tap, spec.n_embd, spec.prefix)
        if self._trunk:
            self._trunk.check(spec.examples)
        if spec.from_engine and ask is None:
            raise TrainerFailed("the checkpoints are the engine's to give, and there is nobody to ask")

    @property
    def range(self) -> range:
        return range(self.spec.first_block, self.spec.end_block)

    def step(self, part: Sequence[Example], lr: float) -> float:
        return self.backward(self.checkpoints(part), 1 / len(part), lambda block: self.optimizers[block].step(lr))

    def evaluate(self, examples: Sequence[Example]) -> Score:
        results: list[tuple[float, bool | None]] = []
        if self._trunk:
            for begin in range(0, len(examples), self.spec.train.batch):
                at = _Computed(self, self._trunk, examples[begin : begin + self.spec.train.batch])
                last = self.range[-1]
                self.blocks.activate(last)
                for j, batch in enumerate(at.batches):
                    results += self.losses(batch, at.prefix(last), at.inputs(last, j))
            return Score.mean(results)
        answer = self.ask("score", examples)
        for example, scores in zip(examples, answer["scores"], strict=True):
            choices = [[total] for total in scores["choices"]]
            found = objective(choices, example.correct, scores["target"], self.spec.train.nll_weight)
            results.append((found.loss, None if found.predicted is None else found.predicted == example.correct))
        return Score.mean(results)

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
        above_prefix: torch.Tensor | None = None
        results: list[tuple[float, bool | None]] = []
        for block in reversed(self.range):
            self.blocks.activate(block)
            is_first = block == self.range[0]
            prefix = at.prefix(block).requires_grad_(not is_first)
            below: list[torch.Tensor] = []
            for j, batch in enumerate(at.batches):
                inputs = at.inputs(block, j).requires_grad_(not is_first)
                if block == self.range[-1]:
                    results += self.losses(batch, prefix, inputs, weight)
                else:
                    outputs = self.suffix.all_rows(prefix, inputs)
                    gradients = [above[j]]
                    # What the sequences share came out once for each micro-batch, all of them the same.
                    if len(outputs) == 2 and j == 0 and above_prefix is not None:
                        gradients.append(above_prefix)
                    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=False) if o.requires_grad]
                    torch.autograd.backward(sloped(pairs))
                    del outputs, pairs  # and what they keep, before the next micro-batch runs
                if not is_first:
                    below.append(_grad(inputs))
            above, above_prefix = below, None if is_first or not prefix.shape[1] else _grad(prefix)
            if block == self.range[-1]:
                loss = finite(results, len(results))
            done(block)
        return loss


class _Tapped(Checkpoints):
    """What the engine wrote: a plane of rows for each block."""

    def __init__(self, learner: Blockwise, part: Sequence[Example], answer: dict[str, Any]) -> None:
        spec = learner.spec
        n_prefix = int(answer["prefix_rows"])
        placed = [
            replace(example, sequences=tuple(Rows(int(offset), int(n)) for offset, n in places))
            for example, places in zip(part, answer["sequences"], strict=True)
        ]
        planes = len(learner.range)
        tap = Tap(spec.tap, spec.n_embd, Rows(0, n_prefix), planes=planes)
        tap.check(placed)
        self._tap, self._first = tap, learner.range[0]
        self.batches = batches(placed, n_prefix, learner.micro, learner.suffix.shares_prefix)

    def prefix(self, block: int) -> torch.Tensor:
        return self._tap.prefix(block - self._first)

    def inputs(self, block: int, j: int) -> torch.Tensor:
        return self._tap.inputs(self.batches[j], block - self._first)


class _Computed(Checkpoints):
    """Run from the trunk's states, block by block, without anything kept but what enters a block."""

    def __init__(self, learner: Blockwise, trunk: Tap, part: Sequence[Example]) -> None:
        first, last = learner.range[0], learner.range[-1]
        self.batches = batches(part, learner.spec.prefix.n, learner.micro, learner.suffix.shares_prefix)
        self._prefix = {first: trunk.prefix()}
        self._inputs = {first: [trunk.inputs(batch) for batch in self.batches]}
        with torch.no_grad():
            for block in range(first, last):
                learner.blocks.activate(block)
                outputs = [learner.suffix.all_rows(self._prefix[block], x) for x in self._inputs[block]]
                self._inputs[block + 1] = [own for own, *_ in outputs]
                self._prefix[block + 1] = outputs[0][1] if len(outputs[0]) == 2 else self._prefix[block]

    def prefix(self, block: int) -> torch.Tensor:
        return self._prefix[block].detach()

    def inputs(self, block: int, j: int) -> torch.Tensor:
        return self._inputs[block][j].detach()


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
