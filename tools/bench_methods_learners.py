"""The methods of bench_methods as runs: one process trains one model for so many seconds.

    python -m tools.bench_methods_learners MODEL METHOD SEED SECONDS [--steps N] [--judge tune] [--lr LR] [--points N]
    python -m tools.bench_methods_learners MODEL METHOD memory

A run ends after SECONDS of training or N steps, whatever comes first. With --state FILE --slice S it is put aside after
S seconds of training and goes on in the next process that is given FILE; methods of WHOLE cannot be.

A method is NAME or NAME:NUMBER: mezo:n (n queries a step), elasticzo:k, suffix:k (BP on the last k blocks from cached
trunk states), loho:period, bp, bp-checkpointed, lora, mezo-lora, sparse-mezo, adazeta, and none, which only serves. The
last line printed is the result as JSON. Time counts steps alone; memory is the peak of the process while it steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from agentd import allocator
from agentd.adapt.in_place import EPSILON, EPSILON_CHANGES, TRAIN_RANK
from agentd.learn.spsa import Trajectory, growing_queries, minimise
from agentd.learn.step_size import schedule
from agentd.learn.weights import adazeta, lora
from agentd.learn.weights.adamw import AdamW
from agentd.learn.weights.bp import Backpropagation, checkpointed
from agentd.learn.weights.cached_trunk import CachedTrunk, InMemory
from agentd.learn.weights.elasticzo import ElasticZO
from agentd.learn.weights.loho import Hybrid
from agentd.learn.weights.mezo import InPlace
from agentd.learn.weights.structure import blocks_of
from tools.bench_elastic_tasks import reviews
from tools.bench_methods_model import BATCH, Peak, Reviews, load
from tools.bench_methods_step import batch_losses

RANK, PROBES = 8, 4
LR, LR_BP = {"lora": 1e-3, "elasticzo": 1e-2, "suffix": 1e-2}, 3e-3
"""Of AdamW and of SGD, chosen on training rows that are not trained on."""
WHOLE = ("lora", "mezo-lora", "suffix", "adazeta")
"""Methods that keep more than weights and a number of steps, so that they cannot be put aside."""
_CLIP, _RECENT = 3.0, 32  # as learn.spsa clips projected gradients
_MOST_QUERIES = 64  # of a step, between whose seeds there is room for so many


class Oracle:
    """The loss of the reviews' mini-batches as `learn.spsa` wants it."""

    def __init__(self, theta: InPlace, data: Any, epsilon: float = EPSILON) -> None:
        self.theta, self.data, self.epsilon = theta, data, epsilon

    def loss(self, seed: int, scale: float, batch: int) -> float:
        return self.theta.loss(seed, scale, self.data.loss(batch))

    def update(self, seed: int, coefficient: float) -> None:
        self.theta.update(seed, coefficient)


@dataclass
class Progress:
    """How far a run is: what the next process needs to go on with it, beside the weights."""

    steps: int = 0
    seconds: float = 0.0
    peak: int = 0
    used: dict[str, float] = field(default_factory=dict)
    recent: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


class Fixed:
    """The same mini-batch always: what the memory of a step is measured on."""

    def __init__(self, model: Any) -> None:
        self._loss = batch_losses(model, 8, 64)["next token at every position"]
        self.train = range(BATCH)

    def loss(self, _: int) -> Any:
        return self._loss


def learn(
    model: Any, data: Any, method: str, seed: int, seconds: float, lr: float | None, at: Progress, total: int
) -> Iterator[None]:
    """Takes steps from number `at.steps` of `total` on, yielding after each. Writes the step sizes it chose into
    `at.used`. An `lr` is that of BP and AdamW; at 0 nothing is calibrated either, as only the memory of steps is of
    interest."""
    name, _, argument = method.partition(":")
    number, used = int(argument or 1), at.used
    first = seed << 20
    rate = LR.get(name, LR_BP) if lr is None else lr
    if name == "none":
        while True:
            with torch.no_grad():
                data.loss(0)()
            yield
    elif name in ("mezo", "sparse-mezo", "mezo-lora", "adazeta"):
        changes = None
        if name == "mezo-lora":
            changes = lora.beside(model, RANK, 2 * RANK, seed)
        elif name == "adazeta":
            changes = adazeta.beside(model, TRAIN_RANK, seed)
        if changes is None:
            oracle = Oracle(InPlace(model, sparsity=0.75 if name == "sparse-mezo" else None), data)
        else:
            oracle = Oracle(InPlace(changes), data, EPSILON_CHANGES)
        with changes.attached() if changes is not None else nullcontext():
            queries = growing_queries if name == "adazeta" else lambda epoch: number
            yield from zeroth_order(oracle, queries, first, lr, at, total)
    elif name == "elasticzo":
        elastic = ElasticZO(model, number)
        if "lr_bp" not in used:
            trunk = elastic.zo if lr != 0 else None
            used |= {"lr_bp": rate, "lr_zo": 0.0 if trunk is None else calibrated(Oracle(trunk, data), first)}
            if trunk is not None:
                yield
        for step in range(at.steps, total):
            part = schedule(step + 1, total)
            elastic.step(data.loss(step), first + 64 + step, EPSILON, part * used["lr_zo"], part * used["lr_bp"])
            yield
    elif name == "loho":
        hybrid = Hybrid(model, number)
        if "lr_bp" not in used:
            used |= {"lr_bp": rate, "lr_zo": calibrated(Oracle(hybrid.zo, data), first) if lr != 0 else 0.0}
        for step in range(at.steps, total):
            hybrid.step(step, data.loss(step), EPSILON, used["lr_zo"], used["lr_bp"])
            yield
    elif name == "suffix":
        cache = CachedTrunk(model, number, InMemory())
        bp = Backpropagation(model, cache.split.suffix)
        used["lr_bp"] = rate
        batches = len(data.train) // BATCH
        for step in range(total):
            with cache.batch(step % batches):
                bp.step(data.loss(step % batches), rate, first + step)
            yield
    elif name in ("bp", "bp-checkpointed"):
        bp = Backpropagation(model, checkpointing=name == "bp-checkpointed")
        used["lr_bp"] = rate
        for step in range(at.steps, total):
            bp.step(data.loss(step), schedule(step + 1, total) * rate, first + step)
            yield
    elif name == "lora":
        yield from adam_on_lora(model, data, seed, rate, used, total)
    else:
        raise SystemExit(f"there is no method {method}")


def zeroth_order(
    oracle: Oracle, queries: Callable[[int], int], first: int, lr: float | None, at: Progress, total: int
) -> Iterator[None]:
    """n-SPSA as learn.spsa takes its steps, without its judging on the way: the step size is calibrated once, warms up
    and falls along a cosine, and projected gradients are clipped. `queries` of a step, by its epoch."""
    if "lr_zo" not in at.used:
        n = queries(1)
        at.used |= {"lr_zo": calibrated(oracle, first, n) if lr is None else lr, "queries": n}
        yield
    batches = max(1, len(oracle.data.train) // BATCH)
    for step in range(at.steps, total):
        n = queries(1 + step // batches)
        rate = at.used["lr_zo"] * schedule(step + 1, total)
        measured = []
        for query in range(n):
            seed = first + 64 + step * _MOST_QUERIES + query
            plus, minus = oracle.theta.pair(seed, oracle.epsilon, oracle.data.loss(step))
            measured.append((seed, (plus - minus) / (2 * oracle.epsilon)))
        at.recent = [*at.recent, *(abs(g) for _, g in measured)][-_RECENT:]
        limit = _CLIP * statistics.median(at.recent)
        if rate > 0:
            limit = min(limit, oracle.epsilon * n / rate)
        for seed, g in measured:
            oracle.update(seed, -rate / n * max(-limit, min(limit, g)))
        yield


def calibrated(oracle: Oracle, first: int, queries: int = 1) -> float:
    """The step size that learn.spsa finds; its probes are an update too."""
    trajectory = Trajectory()
    for _ in minimise(oracle, steps=1, epsilon=oracle.epsilon, probes=PROBES, first_seed=first, trajectory=trajectory):
        pass
    assert trajectory.calibration is not None
    found = trajectory.calibration
    trusted = queries * oracle.epsilon / max(found.gradient, 1e-9)
    return found.agreement * min(found.stable_lr(queries), trusted)


def adam_on_lora(model: Any, data: Any, seed: int, lr: float, used: dict[str, float], total: int) -> Iterator[None]:
    model.requires_grad_(False)
    changes = lora.beside(model, RANK, 2 * RANK, seed, exact=False)
    descent, used["lr_adamw"] = AdamW(changes), lr
    with changes.attached():
        for step in range(total):
            with descent.trained(), checkpointed(blocks_of(model)):
                torch.autograd.backward(data.loss(step)())
            descent.apply(schedule(step + 1, total) * lr, step)
            yield


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    model = load(options.model, options.dtype)
    data = Reviews(model, options.model, reviews(options.judge), int(options.seed))
    at, state = Progress(), options.state
    if state is not None and state.exists():
        kept = torch.load(state, weights_only=True)
        at = Progress(**kept["progress"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept["weights"][name])
    else:
        right, loss = data.judge()
        at.curve.append({"seconds": 0.0, "steps": 0, "accuracy": right, "loss": loss})
    peak, begun = Peak(), at.seconds
    run = learn(model, data, options.method, int(options.seed), options.seconds, options.lr, at, options.steps)
    allocator.give_back()
    peak.reset()
    while True:
        started = time.monotonic()
        over = next(run, run) is run
        at.seconds += time.monotonic() - started
        at.steps += not over
        over = over or at.seconds >= options.seconds or at.steps >= options.steps
        done = max(at.seconds / options.seconds, at.steps / options.steps)
        if over or done >= len(at.curve) / options.points:
            at.peak = max(at.peak, peak.read())
            right, loss = data.judge()
            at.curve.append({"seconds": round(at.seconds, 1), "steps": at.steps, "accuracy": right, "loss": loss})
            allocator.give_back()
            peak.reset()
        if over:
            return {
                "curve": at.curve,
                "seconds": round(at.seconds, 1),
                "steps": at.steps,
                "peak_bytes": at.peak,
                "used": at.used,
            }
        if state is not None and at.seconds - begun >= options.slice:
            at.peak = max(at.peak, peak.read())
            weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
            partial = state.with_suffix(".tmp")
            torch.save({"weights": weights, "progress": asdict(at)}, partial)
            partial.replace(state)
            return {"steps": at.steps, "seconds": round(at.seconds, 1)}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """The peak of three steps on 8 x 64 tokens with the loss at every position."""
    model = load(options.model, options.dtype)
    data, peak = Fixed(model), Peak()
    run = learn(model, data, options.method, 0, 600.0, 0.0, Progress(), 1000)
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
    parser.add_argument("--steps", type=int, default=1000, help="at the most; schedules end there")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--slice", type=float, default=float("inf"), help="seconds of training in this process")
    options = parser.parse_args()
    print(json.dumps(memory(options) if options.seed == "memory" else accuracy(options)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
