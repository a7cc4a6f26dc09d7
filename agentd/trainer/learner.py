"""What is trained, whatever the way through its blocks: the LoRA matrices, how a batch is scored, what is written."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agentd.errors import TrainerFailed
from agentd.learn.objectives import objective
from agentd.learn.slopes import sloped
from agentd.trainer.blocks import Blocks
from agentd.trainer.gguf_file import GGUFFile
from agentd.trainer.head import Head
from agentd.trainer.lora import attach, outside, read_adapter, read_control, write_adapter
from agentd.trainer.shortcuts import Suffix
from agentd.trainer.spec import Example, InvalidSpec, Spec, Term
from agentd.trainer.tap import Batch, shares_well


@dataclass(frozen=True)
class Score:
    """Means over examples; accuracy over those with choices, None without any."""

    loss: float
    accuracy: float | None

    @classmethod
    def mean(cls, results: Sequence[tuple[float, bool | None]]) -> "Score":
        chosen = [right for _, right in results if right is not None]
        loss = math.fsum(loss for loss, _ in results) / len(results)
        return cls(loss, sum(chosen) / len(chosen) if chosen else None)


class Learner(ABC):
    """Raises TrainerFailed and ModelUnusable while it is built."""

    trim_every = 1
    """Steps after which the heap is tidied. Every batch has shapes of its own, and the gaps that one leaves do not fit
    the next; but what is given back has to be taken again."""

    def __init__(self, spec: Spec, *, resident: bool) -> None:
        self.spec, options = spec, spec.train
        self.file = GGUFFile(spec.model)
        n_embd = self.file.header.embedding_length
        if spec.n_embd != n_embd:
            raise InvalidSpec([f"tap.n_embd is {spec.n_embd}, and the model's hidden size is {n_embd}"])
        control = read_control(spec.control, n_embd) if spec.control else None
        self.parent = read_adapter(spec.initial) if spec.initial else None
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        self.blocks = Blocks(self.file, spec.first_block, spec.end_block, control, resident, dtype)
        if spec.end_block != self.blocks.n_blocks:
            raise InvalidSpec([f"end_block must be {self.blocks.n_blocks} to score terms"])
        self.lora = attach(self.blocks, options.rank, options.alpha, options.seed, self.parent)
        self.suffix = Suffix(self.blocks, shares_well(spec.examples, spec.prefix.n, options.micro_tokens))
        self.head = Head(self.blocks)
        highest = max(term.token for example in spec.examples for term in terms(example))
        if highest >= self.head.n_vocab:
            raise InvalidSpec([f"token {highest} is beyond the vocabulary of {self.head.n_vocab}"])

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [matrix for layer in self.lora.values() for matrix in (layer.a, layer.b)]

    @abstractmethod
    def step(self, part: Sequence[Example], lr: float) -> float:
        """One step of AdamW down the mean loss over `part`, which is returned."""

    @abstractmethod
    def evaluate(self, examples: Sequence[Example]) -> Score: ...

    def losses(
        self, batch: Batch, prefix: torch.Tensor, inputs: torch.Tensor, weight: float | None = None
    ) -> list[tuple[float, bool | None]]:
        """Per example its loss and whether its choice was right; with a weight, backpropagates weight * sum.

        prefix  (1, rows, n_embd) and inputs (sequences, tokens, n_embd) enter the first block that runs
        """
        rows: dict[tuple[int, int], int] = {}
        row, token = [], []
        for example, first in zip(batch.examples, batch.first, strict=True):
            for term in terms(example):
                row.append(rows.setdefault((first + term.sequence, term.position), len(rows)))
                token.append(term.token)
        with torch.set_grad_enabled(weight is not None):
            hidden = self.suffix(prefix, inputs, list(rows))
            scored = self.head.log_likelihoods(hidden, torch.tensor(row), torch.tensor(token))
        values = iter(scored.tolist())
        out: list[tuple[float, bool | None]] = []
        slopes: list[float] = []
        for example in batch.examples:
            choices = [[next(values) for _ in choice] for choice in example.choices]
            target = [next(values) for _ in example.target]
            result = objective(choices, example.correct, target, self.spec.train.nll_weight)
            out.append((result.loss, None if result.predicted is None else result.predicted == example.correct))
            slopes += [slope for part in (*result.choices, result.target) for slope in part]
        if weight is not None:
            torch.autograd.backward(sloped([(scored, torch.tensor(slopes) * weight)]))
        return out

    def write(self, path: Path, *, durable: bool = True) -> None:
        """The adapter as it stands, with the parent's matrices of the blocks that are not trained."""
        alpha = self.spec.train.alpha
        pairs = outside(self.parent, self.blocks, alpha) if self.parent else {}
        pairs |= {name: (layer.a, layer.b) for name, layer in self.lora.items()}
        write_adapter(path, self.file.header.architecture, alpha, pairs, durable=durable)


def finite(results: Iterable[tuple[float, bool | None]], n: int) -> float:
    """The mean loss of a step's results. Raises TrainerFailed unless it is a number."""
    loss = math.fsum(loss for loss, _ in results) / n
    if not math.isfinite(loss):
        raise TrainerFailed(f"the loss is {loss}; a lower train.lr may help")
    return loss


def terms(example: Example) -> list[Term]:
    return [term for part in (*example.choices, example.target) for term in part]
