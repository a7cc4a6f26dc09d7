"""The background commands of a classifier's pass: encode, use, score, learn. Generators, as in engine/session.py.

Learning happens here, in the engine's own process: a step takes milliseconds, so a request never waits longer than
that, and a second process would hold a second copy of torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentd.engine.int8 import inputs
from agentd.engine.int8.model import Model
from agentd.engine.protocol import Weights
from agentd.engine.session import Steps
from agentd.errors import AgentdError, InvalidRequest, RevisionCorrupt
from agentd.learn.int8 import ledger, loss
from agentd.learn.int8.directions import Noise
from agentd.learn.int8.elastic import ElasticInt8
from agentd.learn.int8.ledger import SignLedger, SignStep
from agentd.learn.int8.network import Int8Network
from agentd.learn.int8.tensor import Int8Tensor, dequantise

_TO_NATS = math.log(2) / (1 << loss.FRACTION)
_EVALUATIONS = 10  # of dev, over a run
_PIECE = 32  # examples in a forward pass of an evaluation


@dataclass
class _Best:
    """The network that did best on dev so far, and after how many steps."""

    network: Int8Network
    step: int
    accuracy: float | None
    loss: float | None


class ClassifierSession:
    def __init__(self, model: Model, staged: Mapping[Weights, Int8Network]) -> None:
        self._model, self._staged = model, staged
        self._network = staged["0"]
        self._examples: list[tuple[Int8Tensor, int] | None] = []

    def encode(self, source: str, target: str) -> Steps:
        """Quantises the examples of the JSONL file `source`; writes {"correct": class} or {"error": reason} a line.

        An example that cannot be used keeps its number and is never asked for.
        """
        self._examples = []
        with (
            Path(source).open(encoding="utf-8", newline="\n") as lines,
            Path(target).open("w", encoding="utf-8") as out,
        ):
            for number, line in enumerate(lines):
                try:
                    x, correct = self._example(json.loads(line))
                    self._examples.append((x, correct))
                    out.write(json.dumps({"correct": correct}) + "\n")
                except AgentdError as error:
                    self._examples.append(None)
                    out.write(json.dumps({"error": str(error)}) + "\n")
                if number % 32 == 31:
                    yield number + 1
        return len(self._examples)

    def use(self, weights: Weights) -> Steps:
        """Computes with this staged network from now on. Raises RevisionCorrupt."""
        if weights not in self._staged:
            raise RevisionCorrupt(weights, "it is not staged")
        self._network = self._staged[weights]
        yield None

    def score(self, examples: Sequence[int]) -> Steps:
        """[{"choices": [ln p of every class], "target": [ln p of the right one]}], each example alone, as served."""
        scores = []
        for number in examples:
            x, correct = self._chosen(number)
            logits, _ = self._network.forward(x)
            found = torch.log_softmax(dequantise(logits).double(), 1)[0].tolist()
            scores.append({"choices": found, "target": [found[correct]]})
            yield len(scores)
        return scores

    def learn(
        self,
        train: Sequence[int],
        dev: Sequence[int],
        *,
        parent: int,
        bp_layers: int,
        frozen: bool,
        steps: int,
        batch: int,
        seed: int,
        noise: tuple[int, int],
        zo_bits: Sequence[int],
        bp_bits: Sequence[int],
        network: str,
        ledger: str,
    ) -> Steps:
        """ElasticZO-INT8 on a copy of the network in use; `frozen` leaves the layers below the cutoff as they are.

        Bits are schedules over the run. The step that did best on dev is what is kept: its network is written to
        `network`, the zeroth-order steps that led there to `ledger`, if there are any. Yields the figures of steps.
        """
        x, labels = self._batch(train)
        held, held_labels = self._batch(dev) if dev else (None, None)
        copy = self._network.copy()
        run = ElasticInt8(copy, bp_layers, Noise(*noise), frozen=frozen)
        order = torch.Generator().manual_seed(seed)
        taken = SignLedger(parent, run.noise, bp_layers)
        best = _Best(copy.copy(), 0, *_evaluate(copy, held, held_labels))
        before = best
        every = max(1, steps // _EVALUATIONS)
        for step in range(steps):
            chosen = torch.randint(0, len(labels), (min(batch, len(labels)),), generator=order)
            key = ((seed << 20) + step) % (1 << 64)
            bits = _at(zo_bits, step, steps)
            result = run.step(x[chosen], labels[chosen], key, zo_bits=bits, bp_bits=_at(bp_bits, step, steps))
            if run.has_zo:
                taken.steps.append(SignStep(key, result.sign, bits))
            figures: dict[str, Any] = {"step": step + 1, "steps": steps, "sign": result.sign, "seed": key}
            figures["loss"] = _TO_NATS * (result.loss_plus + result.loss_minus) / (2 * len(chosen))
            if held is not None and ((step + 1) % every == 0 or step + 1 == steps):
                accuracy, mean = _evaluate(copy, held, held_labels)
                figures |= {"dev_accuracy": accuracy, "dev_loss": mean}
                if _below(mean, best.loss):
                    best = _Best(copy.copy(), step + 1, accuracy, mean)
            yield figures
        if held is None:
            best = _Best(copy, steps, None, None)
        taken.steps = taken.steps[: best.step]
        self._write(best.network, taken, run.has_zo, Path(network), Path(ledger))
        return {
            "steps": steps,
            "best_step": best.step,
            "zo_steps": len(taken.steps),
            "dev_loss_before": before.loss,
            "dev_loss_after": best.loss,
            "dev_accuracy_before": before.accuracy,
            "dev_accuracy_after": best.accuracy,
        }

    def close(self) -> None:
        self._examples = []

    def _write(self, network: Int8Network, taken: SignLedger, has_zo: bool, target: Path, where: Path) -> None:
        if has_zo:
            # A ledger that does not lead where the run went would be worse than none.
            replayed = self._network.copy()
            ledger.replay(taken, replayed)
            cutoff = network.architecture.cutoff(taken.bp_layers)
            for p in network.described:
                same = torch.equal(replayed.parameters[p.index].mantissa, network.parameters[p.index].mantissa)
                if p.layer < cutoff and not same:
                    raise AgentdError(f"the ledger's replay differs from the run in {p.name}")
            where.write_bytes(ledger.encode(taken))
        self._model.save(network, target)

    def _example(self, line: dict[str, Any]) -> tuple[Int8Tensor, int]:
        classes = self._model.header.classes
        if line["target"] not in classes:
            raise InvalidRequest(f"{line['target']!r} is none of the model's classes")
        x = self._model.quantised(inputs.values(line["input"], self._model.header.network.input)[None])
        return x, classes.index(line["target"])

    def _chosen(self, number: int) -> tuple[Int8Tensor, int]:
        found = self._examples[number] if 0 <= number < len(self._examples) else None
        if found is None:
            raise InvalidRequest(f"the session has no example {number} that can be used")
        return found

    def _batch(self, numbers: Sequence[int]) -> tuple[Int8Tensor, Tensor]:
        found = [self._chosen(number) for number in numbers]
        if not found:
            raise InvalidRequest("learning needs examples")
        mantissas = torch.cat([x.mantissa for x, _ in found])
        return Int8Tensor(mantissas, found[0][0].exponent), torch.tensor([correct for _, correct in found])


def _evaluate(network: Int8Network, x: Int8Tensor | None, labels: Tensor | None) -> tuple[float | None, float | None]:
    """Accuracy and mean cross-entropy in nats; None without examples."""
    if x is None or labels is None:
        return None, None
    right = total = 0
    for start in range(0, len(labels), _PIECE):
        wanted = labels[start : start + _PIECE]
        logits, _ = network.forward(x[start : start + _PIECE])
        right += int((logits.mantissa.argmax(1) == wanted).sum())
        total += loss.cross_entropy(logits, wanted)
    return right / len(labels), _TO_NATS * total / len(labels)


def _below(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and a < b


def _at(schedule: Sequence[int], step: int, steps: int) -> int:
    return schedule[len(schedule) * step // steps]
