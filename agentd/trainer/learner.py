"""What is trained, by any way through its blocks: the LoRA matrices, how a batch is scored, what is written."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agentd.errors import TrainerFailed
from agentd.learn.label_noise import LabelNoise
from agentd.learn.objectives import Objective, example_objective, log_likelihood
from agentd.nn.adamw import AdamW
from agentd.nn.blocks import Blocks
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.head import Head
from agentd.nn.lora_blocks import attach, outside, read_adapter, read_control, write_adapter
from agentd.nn.vjp import vjp
from agentd.trainer.batches import Batch, Example, Layout, batches
from agentd.trainer.shortcuts import Suffix
from agentd.trainer.spec import InvalidSpec, Spec
from agentd.trainer.tap_file import TapFile


class LossNotFinite(TrainerFailed):
    """The loss of a step is no number."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss is {loss}; a lower train.lr may help")


@dataclass(frozen=True)
class Score:
    """Means over examples; accuracy over those with choices, None without any.

    error  decides which state is the best: of choices the loss, of a text 1 minus the geometric mean of its tokens'
           likelihoods. A mean of texts' losses is that of what is never learned (small talk has some 2 nats a token, a
           call 0.03) and of what is wrong; bounded ones bear with noise (Ghosh, Kumar and Sastry 2017).
    """

    loss: float
    accuracy: float | None
    error: float

    @classmethod
    def mean(cls, results: Sequence[tuple[float, bool | None]]) -> "Score":
        chosen = [right for _, right in results if right is not None]
        loss = math.fsum(loss for loss, _ in results) / len(results)
        bounded = (-math.expm1(-loss) if right is None and math.isfinite(loss) else loss for loss, right in results)
        error = math.fsum(bounded) / len(results)
        return cls(loss, sum(chosen) / len(chosen) if chosen else None, error)


class Learner(ABC):
    """Raises TrainerFailed and ModelUnusable while it is built."""

    trim_every = 1
    """Steps after which the heap is tidied. Every batch has shapes of its own, and the gaps that one leaves do not fit
    the next; but what is given back has to be taken again."""

    def __init__(self, spec: Spec, *, in_memory: bool) -> None:
        self.spec, options = spec, spec.options
        encoded = {example.number: example.encoded for example in spec.examples}
        groups = dict(zip([*spec.train, *spec.dev], spec.groups, strict=bool(spec.groups)))
        of = [{number: group for number in part if (group := groups.get(number))} for part in (spec.train, spec.dev)]
        self.noise = LabelNoise(encoded, *of)
        self.file = GGUFFile(spec.model)
        n_embd = self.file.header.embedding_length
        control = read_control(spec.control, n_embd) if spec.control else None
        self.parent = read_adapter(spec.initial) if spec.initial else None
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        self.blocks = Blocks(
            self.file, spec.first_block, spec.end_block, control, in_memory, dtype, streamed=options.streamed
        )
        if spec.end_block != self.blocks.n_blocks:
            raise InvalidSpec([f"end_block must be {self.blocks.n_blocks} to score terms"])
        self.lora = attach(self.blocks, options.rank, options.alpha, options.seed, self.parent)
        self.suffix = Suffix(self.blocks)
        self.head = Head(self.blocks)
        highest = max(token for example in spec.examples for _, _, token in example.terms)
        if highest >= self.head.n_vocab:
            raise InvalidSpec([f"token {highest} is beyond the vocabulary of {self.head.n_vocab}"])

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [matrix for layer in self.lora.values() for matrix in (layer.a, layer.b)]

    @property
    @abstractmethod
    def optimizers(self) -> list[AdamW]:
        """All have taken the same steps."""

    @property
    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the optimizers know, by names that are the same whichever way the blocks are trained."""
        names = {
            id(matrix): f"{name}.{which}"
            for name, layer in self.lora.items()
            for which, matrix in (("a", layer.a), ("b", layer.b))
        }
        for optimizer in self.optimizers:
            for parameter, mean, square in optimizer.moments:
                yield f"mean {names[id(parameter)]}", mean
                yield f"square {names[id(parameter)]}", square

    @abstractmethod
    def step(self, part: Sequence[Example], lr: float) -> float:
        """One step of AdamW down the mean loss over `part`, which is returned."""

    @abstractmethod
    def evaluate(self, examples: Sequence[Example]) -> Score: ...

    def forget_steps(self) -> None:
        """Begins anew with the moments of the gradients: those that led elsewhere say nothing here."""
        for optimizer in self.optimizers:
            optimizer.reset()

    def read(self, path: Path) -> None:
        """Goes on from what `write` has written."""
        pairs = read_adapter(path).pairs
        with torch.no_grad():
            for name, layer in self.lora.items():
                for matrix, written in zip((layer.a, layer.b), pairs[name], strict=True):
                    matrix.copy_(written)
        self.forget_steps()

    def open_tap(self) -> TapFile:
        """The states of all examples, as the specification says where they are."""
        spec = self.spec
        if spec.states == "computed":
            layout = Layout.in_order(spec.examples, spec.prefix)
        else:
            numbers = [example.number for example in spec.examples]
            layout = Layout(spec.prefix, dict(zip(numbers, spec.starts, strict=True)))
        tap = TapFile(spec.tap, self.blocks.n_embd, layout)
        tap.check(spec.examples)
        return tap

    def batches(self, examples: Sequence[Example], prefix: int) -> list[Batch]:
        return batches(examples, prefix, self.spec.options.micro_tokens, self.suffix.shares)

    def losses(
        self, batch: Batch, inputs: torch.Tensor, weight: float | None = None
    ) -> list[tuple[float, bool | None]]:
        """Per example its loss and whether its choice was right; with a weight, backpropagates weight * sum.

        inputs  (rows, tokens, n_embd) enter the first block that runs
        """
        number = {row: i for i, row in enumerate(dict.fromkeys(batch.rows))}
        row = torch.tensor([number[row] for row in batch.rows])
        token = torch.tensor([term[2] for example in batch.examples for term in example.terms])
        with torch.set_grad_enabled(weight is not None):
            hidden = self.suffix(inputs, batch.tree, torch.tensor(list(number)))
            scored = self.head.log_likelihoods(hidden, row, token)
        values = iter(scored.tolist())
        out: list[tuple[float, bool | None]] = []
        by_terms: list[float] = []
        for example in batch.examples:
            choices = [math.fsum(next(values) for _ in choice) for choice in example.encoded.choices]
            target = [next(values) for _ in example.encoded.target]
            if weight is None:
                out.append(self.judged(example, choices, target))
                continue
            result = example_objective(example.encoded, choices, target, self.spec.options.nll_weight)
            out.append((result.loss, _is_right(example, result)))
            share = self.noise.weight(example.number, log_likelihood(example.encoded, choices, target))
            by_terms += [share * by_term for part in (*result.choices, result.target) for by_term in part]
        if weight is not None:
            torch.autograd.backward(vjp([(scored, torch.tensor(by_terms) * weight)]))
        return out

    def judged(self, example: Example, choices: Sequence[float], target: Sequence[float]) -> tuple[float, bool | None]:
        """The loss of an example that judges, which may itself be wrong, and whether its choice was right; arguments as
        of `example_objective`."""
        encoded = example.encoded
        result = example_objective(encoded, choices, target, self.spec.options.nll_weight)
        spared = self.noise.spared(example.number, log_likelihood(encoded, choices, target))
        return result.loss - spared / (1 if choices else len(target)), _is_right(example, result)

    def write(self, path: Path, *, durable: bool = True) -> None:
        """The adapter as it stands, with the parent's matrices of the blocks that are not trained."""
        alpha = self.spec.options.alpha
        pairs = outside(self.parent, self.blocks, alpha) if self.parent else {}
        pairs |= {name: (layer.a, layer.b) for name, layer in self.lora.items()}
        write_adapter(path, self.file.header.architecture, alpha, pairs, durable=durable)


def _is_right(example: Example, result: Objective) -> bool | None:
    return None if result.predicted is None else result.predicted == example.encoded.correct


def finite(results: Iterable[tuple[float, bool | None]], n: int) -> float:
    """The mean loss of a step's results. Raises LossNotFinite."""
    loss = math.fsum(loss for loss, _ in results) / n
    if not math.isfinite(loss):
        raise LossNotFinite(loss)
    return loss
