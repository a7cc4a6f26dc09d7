"""MeZO on a model's own weights: what a step costs beside two forwards, and its projected gradient beside autograd's.

    python -m tools.bench methods step MODEL        MeZO's step against two forwards, and as published
    python -m tools.bench methods gradient MODEL    SPSA's projected gradient against autograd's

MODEL is a GGUF file or a directory of transformers. How well the methods learn, and what memory they take, is measured
through passes of a daemon: `python -m tools.bench passes`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from agentd.adapt.passes.transformers import EPSILON
from agentd.learn.update_rule import DISTRIBUTIONS
from agentd.nn.directions import Direction
from agentd.nn.mezo import InPlace
from tools.bench.elastic_tasks import reviews
from tools.bench.paper.methods_model import DTYPES, Reviews, load

EPSILONS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def published_step(model: torch.nn.Module, seed: int, epsilon: float, lr: float, loss: Callable[[], Tensor]) -> None:
    """A step as in the published implementation of MeZO: four sweeps in place with torch's Gaussian generator."""

    def sweep(scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(mean=0, std=1, size=parameter.shape, dtype=parameter.dtype)
            parameter.data += scale * z

    with torch.no_grad():
        sweep(epsilon)
        plus = float(loss())
        sweep(-2 * epsilon)
        minus = float(loss())
        sweep(epsilon)
        sweep(-lr * (plus - minus) / (2 * epsilon))


def batch_losses(model: Any, batch: int, length: int) -> dict[str, Callable[[], Tensor]]:
    """Losses of one random batch: next-token at every position, and that of one token after the last."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))

    def every() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    def last() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return cross_entropy(logits[:, -1].float(), ids[:, 0])

    return {"next token at every position": every, "one token after the last": last}


def step_times(path: Path, dtype: str, batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step, and the median over rounds of its ratio to the same round's two forwards."""
    model = load(path, dtype)
    rows = []
    for loss_name, loss in batch_losses(model, batch, length).items():
        thetas = {name: InPlace(model, distribution=name) for name in DISTRIBUTIONS}

        def forwards(loss: Callable[[], Tensor] = loss) -> None:
            with torch.no_grad():
                loss()
                loss()

        def ours(theta: InPlace, loss: Callable[[], Tensor] = loss) -> None:
            plus, minus = theta.pair(1, EPSILON, loss)
            theta.update(1, -1e-9 * (plus - minus))

        steps: dict[str, Callable[[], None]] = {"two forwards": forwards}
        steps |= {f"this, {name}": lambda theta=theta: ours(theta) for name, theta in thetas.items()}  # type: ignore[misc]
        steps["published"] = lambda loss=loss: published_step(model, 1, EPSILON, 1e-9, loss)  # type: ignore[misc]
        for step in steps.values():
            step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
        for name, values in seconds.items():
            ratios = [value / base for value, base in zip(values, seconds["two forwards"], strict=True)]
            rows.append(
                {
                    "loss": loss_name,
                    "step": name,
                    "seconds": statistics.median(values),
                    "fastest": min(values),
                    "ratio": statistics.median(ratios),
                    "ratio_fastest": min(values) / min(seconds["two forwards"]),
                }
            )
    return rows


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """The parameters in another type. Buffers keep theirs, and transformers' own method refuses what was quantised."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def gradient_errors(
    path: Path, dtype: str, seeds: int, epsilons: Sequence[float], distributions: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """|g - z'G| / ||G|| by epsilon for G, autograd's gradient in fp32 at the same weights; a batch of 16 reviews.

    The denominator is the standard deviation of z'G over z: single derivatives may be near 0.
    """
    model = load(path, dtype)
    cast(model, torch.float32)
    data = Reviews(model, path, reviews("tune"), seed=0)
    loss = data.loss(0)
    torch.autograd.backward(loss())
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()  # or they would change their type with the model's
    norm = sum(float((g * g).sum(dtype=torch.float64)) for g in gradient.values()) ** 0.5
    for distribution in distributions:
        z = Direction(distribution)
        theta = InPlace(model, distribution=distribution)
        derivatives = [
            sum(
                float(torch.dot(gradient[name].view(-1), z.piece(seed, number, 0, p.numel(), torch.float32, p.device)))
                for name, (number, p) in theta.theta.items()
            )
            for seed in range(seeds)
        ]
        cast(model, DTYPES[dtype])
        theta = InPlace(model, distribution=distribution)
        for epsilon in epsilons:
            errors = []
            for seed, derivative in enumerate(derivatives):
                plus, minus = theta.pair(seed, epsilon, loss)
                errors.append(abs((plus - minus) / (2 * epsilon) - derivative) / norm)
            error, worst = statistics.median(errors), max(errors)
            yield {
                "dtype": dtype, "distribution": distribution, "epsilon": epsilon, "error": error, "worst": worst
            }  # fmt: skip
        cast(model, torch.float32)


def print_step_times(options: argparse.Namespace) -> None:
    print("| loss | step | seconds (median) | fastest | ratio to two forwards | of the fastest |")
    print("|---|---|--:|--:|--:|--:|")
    for row in step_times(options.model, options.dtype, options.batch, options.length, options.rounds):
        print(
            f"| {row['loss']} | {row['step']} | {row['seconds']:.3f} | {row['fastest']:.3f} | {row['ratio']:.2f} | "
            f"{row['ratio_fastest']:.2f} |",
            flush=True,
        )


def print_gradient_errors(options: argparse.Namespace) -> None:
    print("| weights | z | epsilon | relative error (median) | worst |\n|---|---|--:|--:|--:|")
    for row in gradient_errors(
        options.model, options.dtype, options.seeds, options.epsilons, options.distributions.split(",")
    ):
        print(
            f"| {row['dtype']} | {row['distribution']} | {row['epsilon']:g} | {row['error']:.3f} | "
            f"{row['worst']:.3f} |",
            flush=True,
        )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench methods", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step")
    step.set_defaults(action=print_step_times)
    step.add_argument("--batch", type=int, default=8)
    step.add_argument("--length", type=int, default=64)
    step.add_argument("--rounds", type=int, default=9)
    gradient = commands.add_parser("gradient")
    gradient.set_defaults(action=print_gradient_errors)
    gradient.add_argument("--seeds", type=int, default=4)
    gradient.add_argument("--epsilons", type=_numbers, default=EPSILONS, help="separated by commas")
    gradient.add_argument("--distributions", default=",".join(DISTRIBUTIONS))
    for command in (step, gradient):
        command.add_argument("model", type=Path)
        command.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    options = parser.parse_args(arguments)
    options.action(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
