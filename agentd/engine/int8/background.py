"""The background commands of a classifier's pass: encode, use, score, learn. Generators, as in engine/session.py.

Learning happens here, in the engine's own process: a step takes milliseconds, so a request never waits longer than
that, and a second process would hold a second copy of torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentd.engine.int8 import inputs
from agentd.engine.int8.model import Model
from agentd.engine.operations import Encode, Learn, LearnReport, ScoreExamples, SignStepReport, Use
from agentd.engine.protocol import Scores, Weights
from agentd.engine.session import OperationSession, Steps
from agentd.errors import AgentdError, InvalidRequest, RevisionCorrupt
from agentd.int8 import loss, sign_ledger
from agentd.int8.elastic import ElasticInt8, part_of
from agentd.int8.network import Int8Network
from agentd.int8.noise import Noise
from agentd.int8.sign_ledger import SignLedger, SignStep
from agentd.int8.tensor import Int8Tensor, dequantise
from agentd.learn.encoded import Encoded
from agentd.learn.optimise import EarlyStopping

_TO_NATS = math.log(2) / (1 << loss.FRACTION)
_EVALUATIONS = 10  # of dev, over a run
_PIECE = 32  # examples in a forward pass of an evaluation


class ClassifierSession(OperationSession):
    def __init__(self, model: Model, networks: Mapping[Weights, Int8Network]) -> None:
        super().__init__()
        self._model, self._networks = model, networks
        self._network = networks["0"]
        self._examples: list[tuple[Int8Tensor, int] | None] = []
        self.on(Encode, self._encode)
        self.on(Use, self._use)
        self.on(ScoreExamples, self._score)
        self.on(Learn, self._learn)

    def _encode(self, op: Encode) -> Steps[int, int]:
        """Quantises the examples; writes what is right, or {"error": reason}, a line."""
        self._examples = []
        with op.source.open(encoding="utf-8", newline="\n") as lines, op.target.open("w", encoding="utf-8") as out:
            for number, line in enumerate(lines):
                try:
                    x, correct = self._parsed(json.loads(line))
                    self._examples.append((x, correct))
                    out.write(json.dumps(asdict(Encoded.of([], [], correct, []))) + "\n")
                except AgentdError as error:
                    self._examples.append(None)
                    out.write(json.dumps({"error": str(error)}) + "\n")
                if number % 32 == 31:
                    yield number + 1
        return len(self._examples)

    def _use(self, op: Use) -> Steps[None, None]:
        yield None
        if op.weights not in self._networks:
            raise RevisionCorrupt(op.weights, "it is not staged")
        self._network = self._networks[op.weights]

    def _score(self, op: ScoreExamples) -> Steps[int, list[Scores]]:
        """Of every class, and of the right one; each example alone, as served."""
        scores = []
        for number in op.examples:
            x, correct = self._example(number)
            logits, _ = self._network.forward(x)
            choices = torch.log_softmax(dequantise(logits).double(), 1)[0].tolist()
            scores.append(Scores(choices, [choices[correct]]))
            yield len(scores)
        return scores

    def _learn(self, op: Learn) -> Steps[SignStepReport, LearnReport]:
        x, labels = self._batch(op.train)
        dev_set = self._batch(op.dev) if op.dev else None
        copy = self._network.copy()
        run = ElasticInt8(copy, op.bp_layers, Noise(*op.noise), frozen=op.frozen)
        order = torch.Generator().manual_seed(op.seed)
        signs = SignLedger(op.parent, run.noise, op.bp_layers)
        stopping, best_network = EarlyStopping(), copy.copy()
        before: tuple[float, float] | tuple[None, None] = (None, None)
        if dev_set:
            before = _evaluate(copy, *dev_set)
            stopping.judge(0, before[1])
        best = before
        steps, every = op.steps, max(1, op.steps // _EVALUATIONS)
        for step in range(steps):
            rows = torch.randint(0, len(labels), (min(op.batch, len(labels)),), generator=order)
            key = ((op.seed << 20) + step) % (1 << 64)
            bits = part_of(op.zo_bits, step, steps)
            result = run.step(x[rows], labels[rows], key, zo_bits=bits, bp_bits=part_of(op.bp_bits, step, steps))
            if run.has_zo:
                signs.steps.append(SignStep(key, result.sign, bits))
            on_dev: tuple[float, float] | tuple[None, None] = (None, None)
            if dev_set and ((step + 1) % every == 0 or step + 1 == steps):
                on_dev = _evaluate(copy, *dev_set)
                if stopping.judge(step + 1, on_dev[1]):
                    best, best_network = on_dev, copy.copy()
            loss = _TO_NATS * (result.loss_plus + result.loss_minus) / (2 * len(rows))
            yield SignStepReport(step + 1, key, result.sign, loss, on_dev[1], on_dev[0])
        best_step = stopping.best_step if dev_set else steps
        signs.steps = signs.steps[:best_step]
        self._write(best_network if dev_set else copy, signs, run.has_zo, op.network, op.ledger)
        return LearnReport(steps, best_step, len(signs.steps), before[1], best[1], before[0], best[0])

    def close(self) -> None:
        self._examples = []

    def _write(self, network: Int8Network, signs: SignLedger, has_zo: bool, target: Path, ledger: Path) -> None:
        if has_zo:
            # A ledger that does not lead where the run went would be worse than none.
            replayed = self._network.copy()
            sign_ledger.replay(signs, replayed)
            cutoff = network.architecture.cutoff(signs.bp_layers)
            for p in network.described:
                same = torch.equal(replayed.parameters[p.index].mantissa, network.parameters[p.index].mantissa)
                if p.layer < cutoff and not same:
                    raise AgentdError(f"the ledger's replay differs from the run in {p.name}")
            ledger.write_bytes(sign_ledger.encode(signs))
        self._model.save(network, target)

    def _parsed(self, line: dict[str, Any]) -> tuple[Int8Tensor, int]:
        classes = self._model.header.classes
        if line["target"] not in classes:
            raise InvalidRequest(f"{line['target']!r} is none of the model's classes")
        x = self._model.quantised(inputs.values(line["input"], self._model.header.network.input)[None])
        return x, classes.index(line["target"])

    def _example(self, number: int) -> tuple[Int8Tensor, int]:
        example = self._examples[number] if 0 <= number < len(self._examples) else None
        if example is None:
            raise InvalidRequest(f"the session has no example {number} that can be used")
        return example

    def _batch(self, numbers: Sequence[int]) -> tuple[Int8Tensor, Tensor]:
        examples = [self._example(number) for number in numbers]
        if not examples:
            raise InvalidRequest("learning needs examples")
        mantissas = torch.cat([x.mantissa for x, _ in examples])
        return Int8Tensor(mantissas, examples[0][0].exponent), torch.tensor([correct for _, correct in examples])


def _evaluate(network: Int8Network, x: Int8Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in nats."""
    right = total = 0
    for start in range(0, len(labels), _PIECE):
        part = labels[start : start + _PIECE]
        logits, _ = network.forward(x[start : start + _PIECE])
        right += int((logits.mantissa.argmax(1) == part).sum())
        total += loss.cross_entropy(logits, part)
    return right / len(labels), _TO_NATS * total / len(labels)
