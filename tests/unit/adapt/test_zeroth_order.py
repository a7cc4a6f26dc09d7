"""Zeroth-order steps through the real engine process, and their ledger."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from agentd.adapt.passes import zeroth_order
from agentd.adapt.passes.loss_journal import LossJournal
from agentd.engine.operations import Encode, Open, Use, WriteControl
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import RevisionCorrupt
from agentd.learn import ledger
from agentd.learn.optimise import StepResult
from agentd.learn.philox import rademacher
from tools import short_model

N, STEPS = 6, 3


async def _no_fallback(error: RevisionCorrupt, revision: int) -> int:
    raise error


async def _steps(
    model: Path, folder: Path, dev: list[int], journal: LossJournal | None = None
) -> tuple[list[StepResult], Any, Path]:
    settings = {"engine": "llamacpp", "path": str(model), "context": 512, "slots": 1, "threads": 1, "gpu_layers": 0}
    engine = Supervisor(
        settings, lambda revision: (None, None), Activity(), revision=0, queue_limit=1, fallback=_no_fallback
    )
    source, control = folder / "examples.jsonl", folder / "control.gguf"
    with source.open("w") as file:
        for i in range(N):
            content = [{"role": "user", "content": f"Is {i} an even number? Answer yes or no."}]
            line = {"input": {"messages": content}, "choices": ["yes", "no"], "target": ("yes", "no")[i % 2]}
            file.write(json.dumps(line) + "\n")
    results: list[StepResult] = []
    await engine.start()
    try:
        await engine.call(Open())
        await engine.call(Encode(source, folder / "tokens.jsonl"))
        await engine.call(Use("0"))
        trajectory = await zeroth_order.run(
            engine,
            train=list(range(N)),
            dev=dev,
            steps=STEPS,
            nll_weight=0.1,
            seed=(1 << 63) - 1,
            weights="0",
            on_step=results.append,
            journal=journal,
        )
        await engine.call(WriteControl(control))
    finally:
        await engine.stop()
    return results, trajectory, control


def test_the_ledger_makes_the_control_vector_again_bit_for_bit(model_path: Path, tmp_path: Path) -> None:
    results, trajectory, control = asyncio.run(_steps(model_path, tmp_path, dev=[]))
    assert [result.step for result in results] == list(range(1, STEPS + 1))
    path = tmp_path / "ledger"
    ledger.write(path, ledger.Ledger(0, trajectory.best_steps))
    vectors = {int(t.name.split(".")[1]): np.array(t.data) for t in gguf.GGUFReader(control).tensors}
    again = {layer: np.zeros_like(vector) for layer, vector in vectors.items()}
    for seed, coefficient in ledger.fold(ledger.read(path).steps):
        for layer in again:
            again[layer] = again[layer] + np.float32(coefficient) * rademacher(seed, layer, len(again[layer]))
    assert len(vectors) == short_model.BLOCKS - 1
    assert all(vector.any() for vector in vectors.values())
    assert all(np.array_equal(again[layer], vector) for layer, vector in vectors.items())


def test_what_did_not_help_on_dev_leaves_no_trace(model_path: Path, tmp_path: Path) -> None:
    _, trajectory, control = asyncio.run(_steps(model_path, tmp_path, dev=[0, 1]))
    best_steps = trajectory.best_steps
    vectors = [np.array(tensor.data) for tensor in gguf.GGUFReader(control).tensors]
    assert any(vector.any() for vector in vectors) == bool(best_steps)
    assert trajectory.best_loss <= trajectory.first_loss


class _CutShort(Exception):
    """After so many losses."""


class _Journal(LossJournal):
    """Counts what is measured, and is cut short before more is than may be."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path, {"belongs": "a run"})
        self.measured, self.most = 0, most

    def tell(self, measure: Callable[[], float]) -> float:
        def counted() -> float:
            if self.measured == self.most:
                raise _CutShort
            self.measured += 1
            return measure()

        return super().tell(counted)


def test_a_run_that_is_cut_short_takes_the_same_steps_when_it_goes_on(model_path: Path, tmp_path: Path) -> None:
    """Nothing that it was told is measured again."""
    path = tmp_path / "losses.state"
    whole = _Journal(tmp_path / "other.state", 1000)
    _, expected, control = asyncio.run(_steps(model_path, tmp_path, [0, 1], whole))
    vectors = control.read_bytes()
    journal = _Journal(path, whole.measured // 2)
    with pytest.raises(_CutShort):
        asyncio.run(_steps(model_path, tmp_path, [0, 1], journal))
    journal.save()
    last = _Journal(path, 1000)
    _, trajectory, control = asyncio.run(_steps(model_path, tmp_path, [0, 1], last))
    assert last.measured == whole.measured - journal.measured
    assert trajectory == expected
    assert control.read_bytes() == vectors
    assert LossJournal(path, {"belongs": "another run"}).tell(lambda: 0.5) == 0.5
