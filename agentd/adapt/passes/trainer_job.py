"""Backpropagation in a pass: what the trainer is told, and what it is answered when it asks for the engine's work.

The engine and the trainer take turns on the same cores. With `blockwise-bp` they do so in every step, because every
step needs the hidden states of the model as it is then; otherwise the frozen trunk is run once: by the engine, or,
where that is faster, by the trainer itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.dataset import Member
from agentd.adapt.planning.setting import Setting
from agentd.engine.operations import ScoreExamples, Tap, Use
from agentd.engine.process.supervisor import Supervisor
from agentd.learn.encoded import Encoded, shared_prefix
from agentd.methods import BLOCKWISE

TRAINED = "training"  # the name under which the engine holds what the trainer has at its current step
NLL_WEIGHT = 0.1


class Backpropagation:
    """One run of the trainer to a new adapter file.

    file  what the engine wrote of its examples, of which `encoded` has those of `members` by number
    """

    def __init__(
        self,
        engine: Supervisor,
        training: Training,
        *,
        model: Path,
        folder: Path,
        setting: Setting,
        members: list[Member],
        encoded: Mapping[int, Encoded],
        file: Path,
        options: dict[str, Any],
    ) -> None:
        assert engine.info is not None
        self._engine, self._training, self._setting = engine, training, setting
        self._model, self._folder, self._options = model, folder, options
        self._dev = [member.number for member in members if member.role == "dev"]
        self._train = [member.number for member in members if member.number not in self._dev]
        self._numbers = [*self._train, *self._dev]
        self._groups = groups_of(members)
        self._encoded, self._file = encoded, file
        self._first, self._end = engine.info.n_layer - setting.blocks, engine.info.n_layer
        self._tap = folder / "tap.f32"

    @property
    def from_engine(self) -> bool:
        """Whether every step asks the engine for the hidden states of all trained blocks."""
        return self._setting.method == BLOCKWISE

    async def tap(self, on_progress: Callable[[int], None]) -> dict[str, Any]:
        """The trunk's states for every example, with the adapters that the session uses; what the trainer is told of
        where they are."""
        if self.from_engine:
            return {"states": "asked"}
        if self._setting.choice.plan.computes_trunk and self._first:
            prefix = shared_prefix([self._encoded[number] for number in self._numbers])
            return {"states": "computed", "prefix": prefix}
        index = await self._engine.call(Tap(self._numbers, self._first, self._first + 1, self._tap), on_progress)
        return {"states": "tapped", "prefix": index.prefix_rows, "starts": index.starts}

    async def train(
        self,
        states: dict[str, Any],
        adapter: Path | None,
        control: Path | None,
        output: Path,
        on_event: Callable[[dict[str, Any]], None],
        limit: int | None = None,
        parking: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Starts from `adapter` and writes `output`. Returns the trainer's last event, `done` or `parked`.

        limit    bytes that the trainer may take
        parking  where its state is kept and what that belongs to, as trainer/spec.py has it
        """
        self._control = control
        spec = {
            "model": str(self._model),
            "first_block": self._first,
            "end_block": self._end,
            "tap": str(self._tap),
            "encoded": str(self._file),
            "train": self._train,
            "dev": self._dev,
            "groups": [self._groups[number] for number in self._numbers],
            "options": self._options,
            "initial": None if adapter is None else str(adapter),
            "control": None if control is None else str(control),
            "output": str(output),
            **states,
            **parking,
        }
        try:
            return await self._training.run(
                spec, self._folder / "trainer.json", on_event, self._answer if self.from_engine else None, limit
            )
        finally:
            self._tap.unlink(missing_ok=True)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the model says of examples with the adapter as it is at this step."""
        await self._engine.stage(TRAINED, Path(request["adapter"]), self._control)
        await self._engine.call(Use(TRAINED))
        numbers = request["examples"]
        if request["ask"] == "score":
            return {"scores": [asdict(score) for score in await self._engine.call(ScoreExamples(numbers))]}
        tap = Tap(numbers, request["first"], request["end"], Path(request["path"]))
        index = await self._engine.call(tap)
        return asdict(index)


def groups_of(members: Sequence[Member]) -> dict[int, int]:
    """By number, which examples may be wrong equally often: those of a task that are new, and those that passes have
    learned from before. Of what the model itself has said, or people have only judged, nothing is wrong (0)."""
    groups: dict[tuple[str, str], int] = {}
    of: dict[int, int] = {}
    for member in members:
        known = member.answered and member.role != "replay"
        key = (member.task.name, member.example.state)
        of[member.number] = groups.setdefault(key, len(groups) + 1) if known else 0
    return of
