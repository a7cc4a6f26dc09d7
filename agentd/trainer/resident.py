"""Backpropagation with all trained blocks in memory, from trunk states tapped once: fastest for few blocks."""

from collections.abc import Sequence

import torch

from agentd.trainer.adamw import AdamW
from agentd.trainer.learner import Learner, Score, finite
from agentd.trainer.spec import Example, Spec
from agentd.trainer.tap import Batch, Tap, batches


class Resident(Learner):
    trim_every = 8  # measured: a step takes 0.75 to 0.85 of the time, and the peak is 0 to 6 MiB higher

    def __init__(self, spec: Spec) -> None:
        self.tap = Tap(spec.tap, spec.n_embd, spec.prefix)
        self.tap.check(spec.examples)
        super().__init__(spec, resident=True)
        self.prefix = self.tap.prefix()
        self.optimizer = AdamW(self.parameters, spec.train.weight_decay)
        self.micro = spec.train.micro_tokens

    def micro_batches(self, examples: Sequence[Example]) -> list[Batch]:
        return batches(examples, self.spec.prefix.n, self.micro, self.suffix.shares_prefix)

    def gradients(self, part: Sequence[Example]) -> float:
        """Adds the gradient of the mean loss over `part` to the matrices' own, and returns that loss."""
        weight = 1 / len(part)
        results = [
            result
            for batch in self.micro_batches(part)
            for result in self.losses(batch, self.prefix, self.tap.inputs(batch), weight)
        ]
        return finite(results, len(part))

    def step(self, part: Sequence[Example], lr: float) -> float:
        loss = self.gradients(part)
        self.optimizer.step(lr)
        return loss

    def evaluate(self, examples: Sequence[Example]) -> Score:
        with torch.no_grad():
            return Score.mean(
                [
                    result
                    for batch in self.micro_batches(examples)
                    for result in self.losses(batch, self.prefix, self.tap.inputs(batch))
                ]
            )
