"""The training loop: setup, train, keep the best on dev, write. Reads top to bottom.

Steps that are too large for a model are taken back: where dev has become no better at all, or a loss is no number,
training goes on from the best state so far with steps of a quarter. So the step size need not be right for a model
that no one has tried, only not too small.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from agentd.durable import publish
from agentd.errors import TrainerFailed
from agentd.host import allocator, page_cache
from agentd.learn.optimise import EarlyStopping
from agentd.learn.step_size import schedule
from agentd.trainer import trunk
from agentd.trainer.batches import Example
from agentd.trainer.blockwise import Ask, Blockwise
from agentd.trainer.in_memory import InMemory
from agentd.trainer.learner import Learner, LossNotFinite, Score
from agentd.trainer.parking import Parking
from agentd.trainer.spec import Spec

Emit = Callable[[dict[str, Any]], None]

_JUDGEMENTS = 2  # by dev, in an epoch
_DECIDES = 24  # examples of dev from which on it says which state is the best; fewer see whether steps are too large
_SMALLER = 0.25  # steps, where they were too large
_SEARCH = 2  # times as much patience, as long as nothing is gained
_ALIKE = 64  # examples that are put into batches by length; more would leave less to chance
_PACE = 3  # steps after which it is known how long one takes
_KEEP_EVERY = 5.0  # seconds after which what was learned is written again: no more is lost with this process


def make_learner(spec: Spec, ask: Ask | None = None) -> Learner:
    """Raises TrainerFailed and ModelUnusable."""
    if spec.states == "asked" or spec.options.checkpoint:
        return Blockwise(spec, ask)
    return InMemory(spec)


def train(
    spec: Spec,
    emit: Emit,
    ask: Ask | None = None,
    parked: Callable[[], bool] = lambda: False,
    terminated: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains as `spec` says and writes the adapter; tells `emit` how it goes (the events of the trainer's protocol).

    parked      asked after every step and every block of the trunk; once it is true the matrices are written as they
                are, and training ends with the event `parked`, whose `step` another specification may go on from
    terminated  asked before every step of a training whose state is kept; once it is true the state is written, and
                False is returned: the same specification goes on from there
    """
    start = time.monotonic()
    options = spec.options
    allocator.while_building()
    torch.manual_seed(options.seed)
    training = [example for example in spec.examples if not example.dev]
    dev = [example for example in spec.examples if example.dev]
    per_epoch = math.ceil(len(training) / options.batch)
    steps = most = per_epoch * options.max_epochs
    done = options.first_step

    def park(written: bool) -> None:
        output = str(spec.output) if written else None
        emit({"event": "parked", "output": output, "step": done, "steps": steps, **_facts(start)})

    if spec.states == "computed":
        note = lambda blocks, of: emit({"event": "trunk", "blocks": blocks, "of": of})  # noqa: E731
        if not trunk.run(spec, note, parked):
            park(written=False)
            return True
    learner = make_learner(spec, ask)
    allocator.while_training()
    page_cache.forget()
    emit({"event": "ready", "seconds": round(time.monotonic() - start, 3)})

    deadline = start + options.seconds
    start = last_write = time.monotonic()
    keeping = spec.output.with_name(f"kept-{spec.output.name}")
    best = _Best(spec, learner, decides=len(dev) >= _DECIDES)
    judge_every = max(1, math.ceil(per_epoch / _JUDGEMENTS))
    scale = 1.0
    parking = Parking(spec, learner, best.path) if spec.parking else None
    resumed = False
    if parking and spec.goes_on:
        try:
            place = parking.restore()
            done, steps, scale, resumed = place["step"], place["steps"], place["scale"], True
            best.restore(place["best"])
            learner.noise.restore(place["noise"])
            start -= place["seconds"]
            emit({"event": "resumed", "step": done, "steps": steps, "scale": scale})
        except ValueError as error:
            emit({"event": "anew", "reason": str(error)})

    def goes_on(broken: bool = False) -> bool:
        """After a look that was no better, or a loss that is no number (`broken`): whether to go on, from the best
        state and with smaller steps where these were too large."""
        nonlocal scale
        gained = best.best_step > options.first_step
        if (best.decides or not gained) and best.failures >= options.patience * (1 if gained else _SEARCH):
            return False
        if broken or not gained:
            best.back()
            scale *= _SMALLER
            emit({"event": "back", "step": best.best_step, "scale": _SMALLER})
        return True

    def save(parking: Parking) -> None:
        began = time.monotonic()
        try:
            place = {"step": done, "steps": steps, "scale": scale, "best": best.as_json(), "seconds": began - start}
            place["noise"] = learner.noise.as_json()
            parking.save(place)
            emit({"event": "saved", "step": done, "steps": steps, "seconds": round(time.monotonic() - began, 3)})
        except OSError as error:  # less is safe than could be, but nothing is lost yet
            emit({"event": "unsaved", "reason": error.strerror or str(error)})

    if dev and not resumed:
        best.look(options.first_step, learner.evaluate(dev), emit)
    parts: list[list[Example]] = []
    begun, began = done, time.monotonic()
    while done < steps:
        ends = parking is not None and terminated()
        if parking and (ends or parking.due):
            save(parking)
        if ends:
            return False
        step = done + 1
        epoch, i = divmod(step - 1, per_epoch)
        if not i or not parts:
            parts = batches_of(training, options.seed, epoch, options.batch)
        done = step
        taken, now = step - 1 - begun, time.monotonic()
        if taken >= _PACE:  # the step size goes down towards the last one, whichever that is
            steps = max(step, min(most, step - 1 + int((deadline - now) * taken / (now - began))))
        try:
            loss = learner.step(parts[i], scale * options.lr * schedule(step, steps))
        except LossNotFinite:  # nothing was moved by this step; those before it were too large
            best.failures += 1
            if dev and goes_on(broken=True):
                continue
            if best.best_step > options.first_step:
                break
            raise
        if not step % learner.trim_every:
            allocator.trim()
        seconds = round(time.monotonic() - start, 3)
        emit({"event": "step", "step": step, "steps": steps, "epoch": epoch, "loss": loss, "seconds": seconds})
        if parked():
            learner.write(spec.output)
            park(written=True)
            return True
        if time.monotonic() - last_write > _KEEP_EVERY:
            learner.write(keeping, durable=False)
            emit({"event": "kept", "step": step, "steps": steps})
            last_write = time.monotonic()
        if dev and (i + 1 == per_epoch or (i + 1) % judge_every == 0 or step == steps):
            best.look(step, learner.evaluate(dev), emit)
            if best.failures and not goes_on():
                break

    if dev:
        best.keep()
    else:
        learner.write(spec.output)
    keeping.unlink(missing_ok=True)
    emit(
        {
            "event": "done",
            "output": str(spec.output),
            "best_step": best.kept if dev else done,
            "dev_loss_before": best.before and best.before.loss,
            "dev_loss_after": best.score and best.score.loss,
            "dev_accuracy_before": best.before and best.before.accuracy,
            "dev_accuracy_after": best.score and best.score.accuracy,
            "steps": done,
            "doubted": learner.noise.doubted,
            **_facts(start),
        }
    )
    return True


def batches_of(training: Sequence[Example], seed: int, epoch: int, size: int) -> list[list[Example]]:
    """The batches of an epoch: the same however often training was parked before it.

    Drawn by chance, but for this: what meets in a batch is of similar length, because a forward pass takes as long as
    its longest sequence does in every row. The batches come in an order drawn by chance again.
    """
    chance = random.Random(f"{seed} {epoch}")
    order = chance.sample(training, len(training))
    span = max(1, _ALIKE // size) * size
    batches: list[list[Example]] = []
    for begin in range(0, len(order), span):
        alike = sorted(order[begin : begin + span], key=lambda example: example.encoded.longest)
        batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    return chance.sample(batches, len(batches))


class _Best(EarlyStopping):
    """The adapter that did best on dev, in a file: what is to be written at the end must not take memory until then.

    A dev that is too small to decide (`decides`) has its best loss somewhere by chance, mostly before the steps have
    become small: there the last state is kept, if it is better than the start.
    """

    def __init__(self, spec: Spec, learner: Learner, *, decides: bool) -> None:
        super().__init__()
        self.decides = decides
        self._last: tuple[int, Score] | None = None
        self.kept = 0  # the step whose state was kept
        self._learner, self._output = learner, spec.output
        self.path = spec.output.with_name(f"best-{spec.output.name}")
        self.before: Score | None = None
        self.score: Score | None = None

    def look(self, step: int, score: Score, emit: Emit) -> None:
        self.before = self.before or score
        better = self.judge(step, score.error)
        self._last = step, score
        emit({"event": "dev", "step": step, "loss": score.loss, "accuracy": score.accuracy, "best": better})
        if better:
            self._learner.write(self.path, durable=False)
            self.score = score

    def as_json(self) -> dict[str, Any]:
        """All that it knows besides its file."""
        facts = {name: getattr(self, name) for name in ("first_loss", "best_loss", "best_step", "failures")}
        scores = {name: score and asdict(score) for name, score in (("before", self.before), ("score", self.score))}
        last = self._last and [self._last[0], asdict(self._last[1])]
        return {**facts, **scores, "last": last}

    def restore(self, known: dict[str, Any]) -> None:
        """As `as_json` has it."""
        for name in ("first_loss", "best_loss", "best_step", "failures"):
            setattr(self, name, known[name])
        self.before, self.score = (known[name] and Score(**known[name]) for name in ("before", "score"))
        self._last = known["last"] and (known["last"][0], Score(**known["last"][1]))

    def back(self) -> None:
        """Goes on from there, if there was any."""
        if self.score is not None:
            self._learner.read(self.path)

    def keep(self) -> None:
        """Makes it the adapter that was trained. Raises TrainerFailed where no loss on dev was a number."""
        if self.score is None:
            raise TrainerFailed("no loss on the development examples is a number")
        self.kept = self.best_step
        if not self.decides and self.before and self._last and self._last[1].error < self.before.error:
            self.kept, self.score = self._last
            self._learner.write(self._output)
        else:
            publish(self.path, self._output)


def _facts(start: float) -> dict[str, Any]:
    return {"seconds": round(time.monotonic() - start, 3), "peak_rss": _peak_rss()}


def _peak_rss() -> int:
    """Bytes. Not getrusage's: on Linux that one begins with the peak of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
