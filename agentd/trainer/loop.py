"""The training loop: setup, train, keep the best on dev, write. Reads top to bottom."""

import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentd.errors import TrainerFailed
from agentd.learn.objectives import objective
from agentd.trainer.blocks import Blocks
from agentd.trainer.gguf_file import GGUFFile
from agentd.trainer.head import Head
from agentd.trainer.lora import attach, outside, read_adapter, read_control, write_adapter
from agentd.trainer.shortcuts import Suffix
from agentd.trainer.spec import Example, InvalidSpec, Spec
from agentd.trainer.tap import Batch, Tap, batches

Emit = Callable[[dict[str, Any]], None]

_ACTIVATIONS = 40 << 20  # bytes a micro-batch may keep for its backward pass
_KEPT_PER_TOKEN = 5  # of the widest row in every block, in float32, about


@dataclass(frozen=True)
class Score:
    """Means over examples; accuracy over those with choices, None without any."""

    loss: float
    accuracy: float | None


class Trainer:
    """The blocks, their LoRA matrices and the tap. Raises TrainerFailed and ModelUnusable while it is built."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.file = GGUFFile(spec.model)
        n_embd = self.file.header.embedding_length
        if spec.n_embd != n_embd:
            raise InvalidSpec([f"tap.n_embd is {spec.n_embd}, and the model's hidden size is {n_embd}"])
        self.tap = Tap(spec.tap, spec.n_embd, spec.prefix)
        self.tap.check(spec.examples)
        control = read_control(spec.control, n_embd) if spec.control else None
        self.parent = read_adapter(spec.initial) if spec.initial else None
        options = spec.train
        self.blocks = Blocks(self.file, spec.first_block, spec.end_block, control, options.checkpoint)
        if spec.end_block != self.blocks.n_blocks:
            raise InvalidSpec([f"end_block must be {self.blocks.n_blocks} to score terms"])
        self.lora = attach(self.blocks, options.rank, options.alpha, options.seed, self.parent)
        self.suffix = Suffix(self.blocks, shared_prefix=not options.checkpoint)
        _give_back()
        self.head = Head(self.blocks)
        tokens = {term.token for example in spec.examples for term in _terms(example)}
        if max(tokens) >= self.head.n_vocab:
            raise InvalidSpec([f"token {max(tokens)} is beyond the vocabulary of {self.head.n_vocab}"])
        self.prefix = self.tap.prefix()
        self.micro_tokens = options.micro_tokens or self._micro_tokens()

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [matrix for layer in self.lora.values() for matrix in (layer.a, layer.b)]

    def micro_batches(self, examples: Sequence[Example]) -> list[Batch]:
        return batches(examples, self.spec.prefix.n, self.micro_tokens, self.suffix.shares_prefix)

    def forward(self, batch: Batch) -> torch.Tensor:
        """log p of every term of the batch's examples, example by example: choices, then target."""
        rows: dict[tuple[int, int], int] = {}
        row, token = [], []
        for example, first in zip(batch.examples, batch.first, strict=True):
            for term in _terms(example):
                row.append(rows.setdefault((first + term.sequence, term.position), len(rows)))
                token.append(term.token)
        hidden = self.suffix(self.prefix, self.tap.inputs(batch), list(rows))
        return self.head.log_likelihoods(hidden, torch.tensor(row), torch.tensor(token))

    def losses(self, batch: Batch, weight: float | None = None) -> list[tuple[float, bool | None]]:
        """Per example its loss and whether its choice was right; with a weight, backpropagates weight * sum."""
        with torch.set_grad_enabled(weight is not None):
            terms = self.forward(batch)
        values = iter(terms.tolist())
        out: list[tuple[float, bool | None]] = []
        slopes: list[float] = []
        for example in batch.examples:
            choices = [[next(values) for _ in choice] for choice in example.choices]
            target = [next(values) for _ in example.target]
            scored = objective(choices, example.correct, target, self.spec.train.nll_weight)
            out.append((scored.loss, None if scored.predicted is None else scored.predicted == example.correct))
            slopes += [slope for part in (*scored.choices, scored.target) for slope in part]
        if weight is not None:
            torch.autograd.backward(terms, torch.tensor(slopes) * weight)
        return out

    def evaluate(self, examples: Sequence[Example]) -> Score:
        scored = [result for batch in self.micro_batches(examples) for result in self.losses(batch)]
        chosen = [right for _, right in scored if right is not None]
        mean = math.fsum(loss for loss, _ in scored) / len(scored)
        return Score(mean, sum(chosen) / len(chosen) if chosen else None)

    def write(self) -> None:
        alpha = self.spec.train.alpha
        pairs = outside(self.parent, self.blocks, alpha) if self.parent else {}
        pairs |= {name: (layer.a, layer.b) for name, layer in self.lora.items()}
        write_adapter(self.spec.output, self.file.header.architecture, alpha, pairs)

    def _micro_tokens(self) -> int:
        width = max(self.file.header.feed_forward_length or 0, 4 * self.spec.n_embd)
        # The last block keeps next to nothing: it runs where it is scored.
        whole = self.blocks.end - self.blocks.first - bool(self.suffix.reduced) if not self.spec.train.checkpoint else 1
        return max(128, min(400, _ACTIVATIONS // (4 * _KEPT_PER_TOKEN * width * max(1, whole))))


def train(spec: Spec, emit: Emit) -> None:
    """Trains as `spec` says and writes the adapter; tells `emit` how it goes (the events of the trainer's protocol)."""
    start = time.monotonic()
    options = spec.train
    torch.manual_seed(options.seed)
    trainer = Trainer(spec)
    optimizer = AdamW(trainer.parameters, options.weight_decay)
    training = [example for example in spec.examples if not example.dev]
    dev = [example for example in spec.examples if example.dev]
    _give_back()
    emit({"event": "ready", "seconds": round(time.monotonic() - start, 3)})

    start = time.monotonic()
    per_epoch = math.ceil(len(training) / options.batch)
    steps = per_epoch * options.max_epochs
    evaluate_every = max(1, math.ceil(per_epoch / 2))
    before = trainer.evaluate(dev) if dev else None
    best, best_step, best_state, stale = before, 0, _copy(trainer.parameters), 0
    if before:
        emit({"event": "dev", "step": 0, "loss": before.loss, "accuracy": before.accuracy, "best": True})

    done = 0
    for step in range(1, steps + 1):
        epoch, i = divmod(step - 1, per_epoch)
        if i == 0:
            order = random.Random(f"{options.seed} {epoch}").sample(training, len(training))
        part = order[i * options.batch : (i + 1) * options.batch]
        loss = math.fsum(
            result[0] for batch in trainer.micro_batches(part) for result in trainer.losses(batch, 1 / len(part))
        )
        if not math.isfinite(loss):
            raise TrainerFailed(f"the loss is {loss} at step {step}; a lower train.lr may help")
        optimizer.step(options.lr * schedule(step, steps))
        done = step
        seconds = round(time.monotonic() - start, 3)
        emit(
            {
                "event": "step",
                "step": step,
                "steps": steps,
                "epoch": epoch,
                "loss": loss / len(part),
                "seconds": seconds,
            }
        )
        if dev and (i + 1 == per_epoch or (i + 1) % evaluate_every == 0):
            score = trainer.evaluate(dev)
            better = best is None or score.loss < best.loss
            emit({"event": "dev", "step": step, "loss": score.loss, "accuracy": score.accuracy, "best": better})
            if better:
                best, best_step, best_state, stale = score, step, _copy(trainer.parameters), 0
            else:
                stale += 1
            if stale >= options.patience:
                break

    if dev:
        with torch.no_grad():
            for parameter, value in zip(trainer.parameters, best_state, strict=True):
                parameter.copy_(value)
    trainer.write()
    emit(
        {
            "event": "done",
            "output": str(spec.output),
            "best_step": best_step if dev else done,
            "dev_loss_before": before and before.loss,
            "dev_loss_after": best and best.loss,
            "dev_accuracy_before": before and before.accuracy,
            "dev_accuracy_after": best and best.accuracy,
            "steps": done,
            "seconds": round(time.monotonic() - start, 3),
            "peak_rss": _peak_rss(),
        }
    )


def _peak_rss() -> int:
    """Bytes. Not getrusage's: on Linux that one begins with the peak of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _give_back() -> None:
    """Returns to the system what building the model left behind in the allocator (glibc only)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to 10 %; step counts from 1."""
    warm_up = max(1, math.ceil(0.05 * steps))
    if step <= warm_up:
        return step / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), over all matrices at once.

    torch's own class brings the compiler into the process with its first step.
    """

    def __init__(self, parameters: list[torch.Tensor], weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.parameters, self.weight_decay, self.betas = parameters, weight_decay, betas
        self.mean = [torch.zeros_like(parameter) for parameter in parameters]
        self.square = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Applies the gradients and clears them."""
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for parameter, mean, square in zip(self.parameters, self.mean, self.square, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            parameter.mul_(1 - lr * self.weight_decay)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.addcdiv_(mean, (square / correction2).sqrt_().add_(1e-8), value=-lr / correction1)
            parameter.grad = None


def _terms(example: Example) -> list[Any]:
    return [term for part in (*example.choices, example.target) for term in part]


def _copy(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
