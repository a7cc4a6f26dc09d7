"""Backpropagation in a pass: what the trainer is told, and what it is answered when it asks for the engine's work.

The engine and the trainer take turns on the same cores. With `blockwise-bp` they do so in every step, because every
step needs the hidden states of the model as it is then; otherwise the frozen trunk is run once: by the engine, or,
where that is faster, by the trainer itself.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentd.adapt import dataset as datasets
from agentd.adapt.dataset import Member
from agentd.adapt.planning import Setting
from agentd.adapt.training import Training
from agentd.engine.supervisor import Supervisor

BLOCKWISE = "blockwise-bp"
TRAINED = "training"  # the name under which the engine holds what the trainer has at its current step
NLL_WEIGHT = 0.1


class Backpropagation:
    """One run of the trainer, from the adapters in `start` to a new adapter file."""

    def __init__(
        self,
        engine: Supervisor,
        training: Training,
        *,
        model: Path,
        folder: Path,
        setting: Setting,
        members: list[Member],
        tokens: Mapping[int, dict[str, Any]],
        options: dict[str, Any],
    ) -> None:
        assert engine.info is not None
        self._engine, self._training, self._setting = engine, training, setting
        self._model, self._folder, self._options = model, folder, options
        self._members, self._tokens = members, tokens
        self._first, self._end = engine.info.n_layer - setting.blocks, engine.info.n_layer
        self._n_embd = engine.info.n_embd
        self._tap = folder / "tap.f32"

    @property
    def from_engine(self) -> bool:
        """Whether every step asks the engine for the hidden states of all trained blocks."""
        return self._setting.method == BLOCKWISE

    async def tap(self, on_progress: Callable[[Any], None]) -> dict[str, Any]:
        """The trunk's states for every example, with the adapters that the session uses: where they are in the file, or
        where they are to be, with the token of every row."""
        if self.from_engine:
            sequences = [[[0, len(s)] for s in self._tokens[m.number]["sequences"]] for m in self._members]
            return {"prefix_rows": 0, "sequences": sequences}
        if self._setting.choice.plan.computes_trunk and self._first:
            return datasets.layout(self._members, self._tokens)
        numbers = [member.number for member in self._members]
        index: dict[str, Any] = await self._engine.call(
            "tap",
            examples=numbers,
            first=self._first,
            end=self._first + 1,
            path=str(self._tap),
            on_progress=on_progress,
        )
        return index

    async def train(
        self,
        index: dict[str, Any],
        adapter: Path | None,
        control: Path | None,
        output: Path,
        on_event: Callable[[dict[str, Any]], None],
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Starts from `adapter` and writes `output`. Returns the trainer's last event, `done` or `parked`.

        limit  bytes that the trainer may take
        """
        self._control = control
        spec = {
            "model": str(self._model),
            "first_block": self._first,
            "end_block": self._end,
            "tap": {"path": str(self._tap), "n_embd": self._n_embd},
            "prefix": {"offset": 0, "n": index["prefix_rows"]},
            "examples": datasets.trainer_examples(
                self._members, self._tokens, index["sequences"], chooses=self._setting.chooses
            ),
            "train": self._options,
            "initial": None if adapter is None else str(adapter),
            "control": None if control is None else str(control),
            "output": str(output),
            "from_engine": self.from_engine,
            "tokens": index.get("tokens"),
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
        await self._engine.call("use", weights=TRAINED)
        numbers = request["examples"]
        if request["ask"] == "score":
            return {"scores": await self._engine.call("score", examples=numbers)}
        tapped: dict[str, Any] = await self._engine.call(
            "tap", examples=numbers, first=request["first"], end=request["end"], path=request["path"]
        )
        return tapped
