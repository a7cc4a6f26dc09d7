"""What a board learns for its fleet: a pass that begins where the fleet is, and ends with a file instead of a revision.

What serves here is not touched, and nothing is judged: the fleet puts together what its boards give, and what comes of
that is a candidate like any other (imported.py). The file is stored with the pass's end, in one transaction.

`ledger`   Zeroth-order steps along directions whose seeds all boards share (FedKSeed, Qin et al. 2024): coefficients of
           z(seed), a number each, so that adding up boards' steps is averaging their weights. Engine transformers.
`adapter`  Low-rank factors by backpropagation: engine transformers gives those beside the fleet's weights, engine
           llama.cpp an adapter that goes on from the fleet's and holds all of it.
"""

import asyncio
import json
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from agentd.adapt.passes import zeroth_order
from agentd.adapt.passes.base import CANDIDATE, Attempt
from agentd.adapt.passes.llamacpp import AdaptationPass
from agentd.adapt.passes.trainer_job import NLL_WEIGHT, TRAINED
from agentd.adapt.passes.transformers import EPSILON, InPlacePass
from agentd.adapt.planning.dataset import Dataset
from agentd.engine.operations import Open, SetRule, Use
from agentd.engine.protocol import BASE, Weights
from agentd.errors import PassFailed
from agentd.learn import ledger, privacy
from agentd.learn.ledger import Step
from agentd.revision.archive import AdapterArchive, WeightsArchive
from agentd.revision.files import ADAPTER, LEDGER, LORA, MANIFEST
from agentd.revision.fleet_file import FleetFile
from agentd.store import fleet

FLEET = "fleet"  # the name under which the engine holds the weights that the fleet has come to
_PROBES = zeroth_order.PROBES[1] - 1  # directions that the first step takes beyond one, at most


@dataclass(frozen=True)
class Order:
    """What a fleet asks for in a round.

    kinds  that it takes, the most wanted first
    start  what it has come to, and the sha256 of the weights that leads to if that is known; None: the base
    seeds  of directions: the first, and how many count up from there
    clip, noise  the owner's: the norm of a ledger's coefficients, and the noise on each in units of that
    """

    run: str
    number: int
    kinds: tuple[str, ...]
    base_sha256: str
    start: WeightsArchive | AdapterArchive | None
    start_sha256: str | None
    seeds: tuple[int, int]
    clip: float | None
    noise: float

    @property
    def name(self) -> str:
        return f"{self.run}/{self.number}"


@dataclass(frozen=True)
class Made:
    """`norm` is that of a ledger's coefficients before they were clipped."""

    kind: str
    file: FleetFile
    norm: float | None = None


class Contribution(Attempt):
    """What all have in common."""

    staged: ClassVar[tuple[str, ...]] = (CANDIDATE, TRAINED, FLEET)
    parks: ClassVar[bool] = False  # the order is gone after a restart; the fleet asks again

    def __init__(self, order: Order, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.order = order

    async def contribute(self, data: Dataset) -> None:
        """Learns and stores what came of it. Raises AgentdError."""
        # Holdout stands behind all others and judges revisions alone; the numbers of the others stay as they are.
        data = replace(data, members=data.of("train", "dev"))
        await self._engine.call(Open())
        try:
            data = await self._encode(data)
            await self._begin()
            await self._learn(data)
            await self._advance("trained")
            made = await asyncio.to_thread(self._made)
        finally:
            await self._close()
        noise = self.order.noise
        result = made.file.encode()
        await self._store.call(
            lambda db: fleet.contributed(
                db,
                self._progress.id,
                result,
                kind=made.kind,
                examples=None if noise else len(data.members),  # how many there are is of the data, too
                rho=privacy.rho(noise) if noise else None,
                norm=made.norm,
            )
        )

    @abstractmethod
    async def _begin(self) -> None:
        """Lets the session compute with the weights that the fleet has come to."""

    @abstractmethod
    def _made(self) -> Made:
        """What was learned, as a file for the fleet."""

    def _file(self, files: Mapping[str, bytes], **facts: str) -> FleetFile:
        return FleetFile({"base_sha256": self.order.base_sha256, **facts}, files)


class _OnWeights(Contribution, InPlacePass):
    """Of engine transformers."""

    @property
    def _start(self) -> Weights:
        return BASE if self.order.start is None else FLEET

    async def _begin(self) -> None:
        start = self.order.start
        if start is not None:
            assert isinstance(start, WeightsArchive)
            path = await asyncio.to_thread(self._write_start, start)
            await self._engine.stage(FLEET, path, None)
        await self._engine.call(Use(self._start))

    def _write_start(self, start: WeightsArchive) -> Path:
        """As the engine reads it: a ledger, what is beside it, and what that means."""
        folder = self._folder / FLEET
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, content in start.files.items():
            (folder / name).write_bytes(content)
        ledger.write(folder / LEDGER, ledger.Ledger(0, start.steps))
        described = {
            "update": start.update,
            "dtype": start.dtype,
            "weights_sha256": self.order.start_sha256,
            "tensors": 0,
            "segments": [segment.as_json() for segment in start.segments],
        }
        (folder / MANIFEST).write_text(json.dumps(described), encoding="utf-8")
        return folder / LEDGER


class LedgerContribution(_OnWeights):
    async def _learn(self, data: Dataset) -> None:
        first, seeds = self.order.seeds
        steps = seeds - _PROBES
        self._progress.begin("zo", steps, "SPSA on all weights, along the fleet's directions")
        await self._engine.call(SetRule(self._setting.session(self._seed)))
        try:
            trajectory = await zeroth_order.run(
                self._engine,
                train=[member.number for member in data.members],
                dev=[],  # the fleet's steps are judged where they are put together
                steps=steps,
                nll_weight=NLL_WEIGHT,
                seed=self._seed + self._progress.id,
                weights=self._start,
                on_step=self._on_step,
                epsilon=EPSILON,
                in_place=True,
                remade=False,
                out_of_time=lambda: self._progress.seconds > self._config.adapt.max_time,
                first=first,
            )
        finally:
            await self._flush_steps()
        self._steps = trajectory.steps

    def _made(self) -> Made:
        order = self.order
        first, n = order.seeds
        coefficients = by_seed(self._steps, first, n)
        norm = sum(value**2 for value in coefficients) ** 0.5
        if order.clip is not None:
            coefficients = privacy.clipped(coefficients, order.clip)
            if order.noise:
                coefficients = privacy.noised(coefficients, order.noise * order.clip, random.SystemRandom().gauss)
        steps = [
            Step(first + place, -value, 1.0, EPSILON)
            for place, value in enumerate(coefficients)
            if value or order.noise
        ]
        content = ledger.encode(ledger.Ledger(0, steps))
        file = self._file({LEDGER: content}, engine=WeightsArchive.engine, dtype=self._setting.dtype)
        return Made("ledger", file, None if order.noise else norm)


class LowRankContribution(_OnWeights):
    def _made(self) -> Made:
        if not self._moved.exists():
            raise PassFailed("nothing was learned: no step was better on dev than none")
        rank, dtype = str(self._setting.rank), self._setting.dtype
        files = {LORA: self._moved.read_bytes()}
        return Made("adapter", self._file(files, engine=WeightsArchive.engine, dtype=dtype, ranks=rank))


class AdapterContribution(Contribution, AdaptationPass):
    """Of engine llama.cpp."""

    def _start(self) -> tuple[Path | None, Path | None]:
        start = self.order.start
        if start is None:
            return None, None
        path = self._folder / f"{FLEET}-{ADAPTER}"
        if not path.exists():
            path.write_bytes(start.files[ADAPTER])
        return path, None

    async def _begin(self) -> None:
        adapter, _ = await asyncio.to_thread(self._start)
        if adapter is not None:
            await self._engine.stage(FLEET, adapter, None)
        await self._engine.call(Use(BASE if adapter is None else FLEET))

    def _made(self) -> Made:
        if ADAPTER not in self._new:
            raise PassFailed("nothing was learned: no block was trained")
        files = {ADAPTER: self._new[ADAPTER].read_bytes()}
        return Made("adapter", self._file(files, engine=AdapterArchive.engine))


def by_seed(steps: Sequence[Step], first: int, n: int) -> list[float]:
    """What steps add along each of `n` directions whose seeds count up from `first`: coefficients, 0 where none
    went."""
    sums = [0.0] * n
    for step in steps:
        sums[step.seed - first] += step.coefficient
    return sums
