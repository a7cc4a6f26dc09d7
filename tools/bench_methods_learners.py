"""The methods of bench_methods as runs: one process trains one model for so many seconds.

    python -m tools.bench_methods_learners MODEL METHOD SEED SECONDS [--judge tune] [--lr LR] [--points N]
    python -m tools.bench_methods_learners MODEL METHOD memory

A method is NAME or NAME:NUMBER: mezo:n (n queries a step), elasticzo:k, suffix:k (BP on the last k blocks from cached
trunk states), loho:period, bp, bp-checkpointed, lora, mezo-lora, sparse-mezo, adazeta, and none, which only serves. The
last line printed is the result as JSON. Time counts steps alone; memory is the peak of the process while it steps.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from agentd import allocator
from agentd.learn.spsa import Trajectory, minimise
from agentd.learn.weights import adazeta, lora
from agentd.learn.weights.bp import Backpropagation
from agentd.learn.weights.cached_trunk import CachedTrunk
from agentd.learn.weights.elasticzo import ElasticZO
from agentd.learn.weights.loho import Hybrid
from agentd.learn.weights.mezo import InPlace
from tools.bench_elastic_tasks import reviews
from tools.bench_methods_model import BATCH, Peak, Reviews, load
from tools.bench_methods_step import EPSILON, batch_losses

RANK, PROBES = 8, 4
LR = {"lora": 1e-3}
LR_BP = 1e-2


class Oracle:
    """The loss of the reviews' mini-batches as `learn.spsa` wants it."""

    def __init__(self, theta: InPlace, data: Any) -> None:
        self.theta, self.data = theta, data

    def loss(self, seed: int, scale: float, batch: int) -> float:
        return self.theta.loss(seed, scale, self.data.loss(batch))

    def update(self, seed: int, coefficient: float) -> None:
        self.theta.update(seed, coefficient)


class Fixed:
    """The same mini-batch always: what the memory of a step is measured on."""

    def __init__(self, model: Any) -> None:
        self._loss = batch_losses(model, 8, 64)["next token at every position"]
        self.train = range(BATCH)

    def loss(self, _: int) -> Any:
        return self._loss


def learn(
    model: Any, data: Any, method: str, seed: int, seconds: float, lr: float | None, used: dict[str, float]
) -> Iterator[None]:
    """Takes steps, yielding after each. Writes the step sizes it chose into `used`. An `lr` is that of BP and AdamW;
    at 0 nothing is calibrated either, as only the memory of steps is of interest."""
    name, _, argument = method.partition(":")
    number = int(argument or 1)
    first = seed << 20
    rate = LR_BP if lr is None else lr
    if name == "none":
        while True:
            with torch.no_grad():
                data.loss(0)()
            yield
    elif name in ("mezo", "sparse-mezo", "mezo-lora", "adazeta"):
        chosen = None
        if name == "mezo-lora":
            lora.attach(model, RANK, 2 * RANK, seed)
            chosen = lora.names(model).__contains__
        elif name == "adazeta":
            adazeta.attach(model, 64, 5, seed)
            chosen = adazeta.names(model).__contains__
        theta = InPlace(model, parameters=chosen, sparsity=0.75 if name == "sparse-mezo" else None)
        yield from zeroth_order(Oracle(theta, data), name, number, first, seconds, lr, used)
    elif name == "elasticzo":
        elastic = ElasticZO(model, number)
        rate_zo = 0.0
        if elastic.zo is not None:
            rate_zo = calibrated(Oracle(elastic.zo, data), first) if lr != 0 else 0.0
            yield
        used |= {"lr_bp": rate, "lr_zo": rate_zo}
        for step in range(1 << 20):
            elastic.step(data.loss(step), first + 64 + step, EPSILON, rate_zo, rate)
            yield
    elif name == "loho":
        hybrid = Hybrid(model, number)
        rate_zo = calibrated(Oracle(hybrid.zo, data), first) if lr != 0 else 0.0
        used |= {"lr_bp": rate, "lr_zo": rate_zo}
        for step in range(1 << 20):
            hybrid.step(step, data.loss(step), EPSILON, rate_zo, rate)
            yield
    elif name == "suffix":
        cache = CachedTrunk(model, number)
        bp = Backpropagation(model, cache.split.suffix)
        used["lr_bp"] = rate
        batches = len(data.train) // BATCH
        for step in range(1 << 20):
            with cache.batch(step % batches):
                bp.step(data.loss(step % batches), rate, first + step)
            yield
    elif name in ("bp", "bp-checkpointed"):
        bp = Backpropagation(model, checkpointing=name == "bp-checkpointed")
        used["lr_bp"] = rate
        for step in range(1 << 20):
            bp.step(data.loss(step), rate, first + step)
            yield
    elif name == "lora":
        yield from adam_on_lora(model, data, seed, LR["lora"] if lr is None else lr, used)
    else:
        raise SystemExit(f"there is no method {method}")


def zeroth_order(
    oracle: Oracle, name: str, queries: int, first: int, seconds: float, lr: float | None, used: dict[str, float]
) -> Iterator[None]:
    """learn.spsa's run; its length, which its schedule needs, is guessed from the time of one pair and one update."""
    started = time.monotonic()
    oracle.theta.pair(first, EPSILON, oracle.data.loss(0))
    oracle.update(first, 0.0)
    one = time.monotonic() - started
    yield
    calibrating = 3 * PROBES * one
    steps = max(1, int((seconds - calibrating) / (one * queries)))
    trajectory = Trajectory()
    if name == "adazeta":
        yield from growing(oracle, steps, first, lr, used)
        return
    for result in minimise(
        oracle, steps=steps, epsilon=EPSILON, lr=lr, queries=queries, first_seed=first,
        probes=PROBES if lr is None else 0, trajectory=trajectory,
    ):  # fmt: skip
        used |= {"lr_zo": max(result.lr, used.get("lr_zo", 0.0)), "queries": queries}
        yield


def growing(oracle: Oracle, pairs: int, first: int, lr: float | None, used: dict[str, float]) -> Iterator[None]:
    """AdaZeta's schedule: epochs of plain steps whose number of queries grows."""
    rate = calibrated(oracle, first) if lr is None else lr
    used["lr_zo"] = rate
    step, done, batches = 0, 0, len(oracle.data.train) // BATCH
    while done < pairs:
        queries = adazeta.queries(1 + step // batches)
        measured = []
        for query in range(queries):
            seed = first + 64 + done + query
            plus, minus = oracle.theta.pair(seed, EPSILON, oracle.data.loss(step))
            measured.append((seed, (plus - minus) / (2 * EPSILON)))
        for seed, g in measured:
            oracle.update(seed, -rate * g / queries)
        step, done = step + 1, done + queries
        yield


def calibrated(oracle: Oracle, first: int) -> float:
    """The step size for single queries that learn.spsa finds; its probes are an update too."""
    trajectory = Trajectory()
    for _ in minimise(oracle, steps=1, epsilon=EPSILON, probes=PROBES, first_seed=first, trajectory=trajectory):
        pass
    assert trajectory.calibration is not None
    rate = trajectory.calibration.best_lr()
    return min(rate, EPSILON / max(trajectory.calibration.gradient, 1e-9) * trajectory.calibration.agreement)


def adam_on_lora(model: Any, data: Any, seed: int, lr: float, used: dict[str, float]) -> Iterator[None]:
    lora.attach(model, RANK, 2 * RANK, seed)
    trained = lora.names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    used["lr_adamw"] = lr
    for step in range(1 << 20):
        torch.autograd.backward(data.loss(step)())
        optimizer.step()
        optimizer.zero_grad()
        yield


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    model = load(options.model, options.dtype)
    data = Reviews(model, options.model, reviews(options.judge), int(options.seed))
    before = data.judge()
    curve: list[dict[str, float]] = [{"seconds": 0.0, "steps": 0, "accuracy": before[0], "loss": before[1]}]
    used: dict[str, float] = {}
    spent, steps, top, peak = 0.0, 0, 0, Peak()
    run = learn(model, data, options.method, int(options.seed), options.seconds, options.lr, used)
    allocator.give_back()
    peak.reset()
    while True:
        started = time.monotonic()
        over = next(run, run) is run
        spent += time.monotonic() - started
        steps += not over
        over = over or spent >= options.seconds
        if over or spent >= len(curve) * options.seconds / options.points:
            top = max(top, peak.read())
            right, loss = data.judge()
            curve.append({"seconds": round(spent, 1), "steps": steps, "accuracy": right, "loss": loss})
            allocator.give_back()
            peak.reset()
        if over:
            return {"curve": curve, "seconds": round(spent, 1), "steps": steps, "peak_bytes": top, "used": used}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """The peak of three steps on 8 x 64 tokens with the loss at every position."""
    model = load(options.model, options.dtype)
    data, peak = Fixed(model), Peak()
    run = learn(model, data, options.method, 0, 600.0, 0.0, {})
    allocator.give_back()
    peak.reset()
    for _ in range(3):
        next(run)
    return {"method": options.method, "peak_bytes": peak.read()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("method")
    parser.add_argument("seed", help="a number, or memory")
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--judge", choices=("heldout", "tune"), default="heldout")
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--lr", type=float)
    options = parser.parse_args()
    print(json.dumps(memory(options) if options.seed == "memory" else accuracy(options)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
