"""A board without a daemon, for Flower's simulation: a linear classifier in numpy that learns as agentd's ledgers do.

It speaks as much of the admin API as `rounds` asks for, so that ClientApp, strategy and formats are those of real
boards. What it is not: a language model, a gate, or a disk. z(seed) are random signs of a counter-based generator, a
round's steps two-sided SPSA with the step size that is given.
"""

import base64
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentd_flower import wire
from agentd_flower.board import JSON, Refused
from agentd_flower.wire import LEDGER, FleetFile

Floats = NDArray[np.float64]
FEATURES, CLASSES = 16, 4
SIZE = FEATURES * CLASSES
BASE = "0" * 64
_EPSILON, _BATCH = 1e-3, 16
_SPREAD = 1.5  # standard deviation of a class's examples about its mean


@dataclass(frozen=True)
class Data:
    """inputs (n, FEATURES), labels (n,)."""

    inputs: Floats
    labels: NDArray[np.int64]

    def loss(self, weights: Floats) -> float:
        """Mean cross-entropy in nats."""
        scores = self.inputs @ weights.reshape(FEATURES, CLASSES)
        top = scores.max(axis=1)
        normaliser = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        return float(np.mean(normaliser - scores[np.arange(len(scores)), self.labels]))

    def accuracy(self, weights: Floats) -> float:
        scores = self.inputs @ weights.reshape(FEATURES, CLASSES)
        return float(np.mean(scores.argmax(axis=1) == self.labels))


@cache
def means() -> Floats:
    """Of the classes (CLASSES, FEATURES); no one knows them but the examples."""
    return np.random.default_rng(7).standard_normal((CLASSES, FEATURES))


def draw(seed: int, n: int, classes: tuple[int, ...]) -> Data:
    dice = np.random.default_rng(seed)
    labels = dice.choice(np.asarray(classes), n)
    return Data(means()[labels] + _SPREAD * dice.standard_normal((n, FEATURES)), labels)


def held_out(n: int = 2000) -> Data:
    """All classes, of no board."""
    return draw(1, n, tuple(range(CLASSES)))


@cache
def direction(seed: int) -> Floats:
    """z(seed): random signs (SIZE,)."""
    return np.where(np.random.Generator(np.random.Philox(key=seed)).random(SIZE) < 0.5, -1.0, 1.0)


def weights_of(file: bytes) -> Floats:
    """What the fleet's file leads to, from a base of zeros."""
    weights = np.zeros(SIZE)
    if file:
        for seed, value in wire.decode_ledger(wire.decode(file).files[LEDGER]).items():
            weights += value * direction(seed)
    return weights


class SimulatedBoard:
    """Board `number`, which sees two of the classes, or `sees` of them. `harm` is what a hostile one multiplies its
    steps by; `clip` and `noise` as in agentd's configuration."""

    def __init__(
        self,
        number: int,
        lr: float = 0.02,
        examples: int = 40,
        harm: float = 1.0,
        sees: int = 2,
        clip: float | None = None,
        noise: float = 0.0,
    ) -> None:
        self._clip, self._noise = clip, noise
        self._number, self._lr, self._harm = number, lr, harm
        mine = tuple((number + place) % CLASSES for place in range(sees))
        self._data, self._own_holdout = draw(1000 + number, examples, mine), draw(500_000 + number, 20, mine)
        self._made: dict[str, JSON] = {}
        self._results: dict[str, bytes] = {}
        self._files: dict[str, bytes] = {}

    def get(self, path: str) -> JSON:
        if path == "/admin/fleet":
            facts = {"name": "simulated", "can_send": ["ledger"], "send": ["ledger", "figures"]}
            return {**facts, "engine": "transformers", "base_sha256": BASE, "dtype": "float64"}
        round_, _, what = path.removeprefix("/admin/fleet/rounds/").partition("/figures")
        del what
        return self._made[round_]

    def post(self, path: str, body: JSON) -> JSON:
        name = f"{body['run']}/{body['number']}"
        data = base64.b64decode(body.get("data") or "")
        if path.endswith("/take"):
            self._made[name] = self._figures(data)
            self._files = {wire.digest(data): data}
            return {"done": True, "state": "committed"}
        state = body["state"]
        if state and not data:
            if state not in self._files:
                raise Refused(404, "not_found", "the file is not here")
            data = self._files[state]
        self._results[name] = self._learned(weights_of(data), int(body["first_seed"]), int(body["seeds"]))
        examples = None if self._noise else len(self._data.labels)
        return {"done": True, "state": "contributed", "kind": "ledger", "examples": examples}

    def download(self, path: str) -> bytes:
        return self._results.pop(path.removeprefix("/admin/fleet/rounds/").removesuffix("/result"))

    def _learned(self, weights: Floats, first: int, n: int) -> bytes:
        dice = np.random.default_rng([self._number, first])
        moved: dict[int, float] = {}
        for seed in range(first, first + n):
            chosen = dice.choice(len(self._data.labels), _BATCH)
            batch, z = Data(self._data.inputs[chosen], self._data.labels[chosen]), direction(seed)
            plus, minus = batch.loss(weights + _EPSILON * z), batch.loss(weights - _EPSILON * z)
            moved[seed] = -self._lr * (plus - minus) / (2 * _EPSILON)
            weights = weights + moved[seed] * z
        values = self._harm * np.asarray([moved[seed] for seed in sorted(moved)])
        if self._clip is not None:  # as agentd.learn.privacy does
            values *= min(1.0, self._clip / float(np.linalg.norm(values) or 1.0))
            values += self._noise * self._clip * dice.standard_normal(len(values))
        file = wire.encode_ledger(dict(zip(sorted(moved), map(float, values), strict=True)))
        facts = {"engine": "transformers", "base_sha256": BASE, "dtype": "float64"}
        return FleetFile(facts, {LEDGER: file}).encode()

    def _figures(self, data: bytes) -> dict[str, Any]:
        weights, own = weights_of(data), self._own_holdout
        figures = {"accuracy_after": own.accuracy(weights), "loss_after": own.loss(weights)}
        figures |= {"accuracy_before": 1.0 / CLASSES, "loss_before": math.log(CLASSES)}
        return {"weights_sha256": wire.digest(weights.tobytes()), "accepted": True, "n": len(own.labels), **figures}
