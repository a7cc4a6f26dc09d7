"""A training that is killed, and one that is told to end: both go on where they were, to the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentd.formats.training_state import TrainingState
from agentd.trainer.loop import train
from agentd.trainer.spec import parse_spec
from tests.engine.trainer.conftest import N_LAYER

OPTIONS = {"batch": 2, "max_epochs": 4, "patience": 99, "lr": 3e-3, "park_every": 0.0}
STEPS = 12

Event = dict[str, Any]


@pytest.fixture(scope="module")
def tap(write_tap: Any) -> Path:
    path: Path = write_tap(N_LAYER - 1)
    return path


@pytest.fixture(autouse=True)
def before_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is written where `park_every` is 0, however long that takes."""
    monkeypatch.setattr("agentd.trainer.parking._SHARE", 0)


class Trainer:
    """One specification, trained as often as it takes."""

    def __init__(self, folder: Path, spec: dict[str, Any], **options: Any) -> None:
        self.folder, self.output, self.state = folder, folder / "adapter.gguf", folder / "state"
        folder.mkdir()
        self.spec = {**spec, "output": str(self.output), "parking": str(self.state), "identity": "a", "goes_on": True}
        self.spec["options"] = {**OPTIONS, **options}

    def run(self, dies_at: int | None = None) -> list[Event]:
        """Its events. At step `dies_at` the process is killed: a fork of this one, which has torch already."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)

                def emit(event: Event) -> None:
                    os.write(writer, json.dumps(event).encode() + b"\n")
                    if event["event"] == "step" and event["step"] == dies_at:
                        os.kill(os.getpid(), signal.SIGKILL)

                train(parse_spec(self.spec), emit)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as lines:
            events = [json.loads(line) for line in lines]
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == (0 if dies_at is None else -signal.SIGKILL), events
        return events


def one(events: list[Event], kind: str) -> Event:
    (event,) = (event for event in events if event["event"] == kind)
    return event


def first_step(events: list[Event]) -> int:
    return int(next(event["step"] for event in events if event["event"] == "step"))


@pytest.fixture(scope="module")
def straight(tap: Path, reviews: Any, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """straight(whole) -> what an uninterrupted training says at its end, and its adapter."""
    known: dict[bool, tuple[Event, bytes]] = {}

    def run(make: Callable[..., Any], whole: bool) -> tuple[Event, bytes]:
        if whole not in known:
            folder = tmp_path_factory.mktemp("straight") / "run"
            trainer = Trainer(folder, make(1, tap), checkpoint=not whole, park_every=99.0)
            known[whole] = one(trainer.run(), "done"), trainer.output.read_bytes()
        return known[whole]

    return run


@pytest.mark.parametrize("whole", [True, False], ids=["in memory", "block by block"])
def test_killed_three_times_it_ends_with_the_same_bits(
    tap: Path, make_spec: Any, straight: Any, tmp_path: Path, whole: bool
) -> None:
    expected, adapter = straight(make_spec, whole)
    killed = Trainer(tmp_path / "killed", make_spec(1, tap), checkpoint=not whole)
    deaths = sorted(random.sample(range(2, STEPS), 3))  # another three every time
    began = [first_step(killed.run(step)) for step in deaths]
    events = killed.run()
    assert [*began, first_step(events)] == [1, *deaths], "the state is written before every step"
    assert killed.output.read_bytes() == adapter, deaths
    done = one(events, "done")
    same = ("steps", "best_step", "dev_loss_before", "dev_loss_after", "dev_accuracy_before", "dev_accuracy_after")
    assert {name: done[name] for name in same} == {name: expected[name] for name in same}, deaths


def test_steps_that_were_too_large_stay_smaller(tap: Path, make_spec: Any, tmp_path: Path) -> None:
    """The best state and how far steps have come down are of the state, too."""
    options = {"lr": 1e4, "max_epochs": 8, "patience": 20}
    unbroken = Trainer(tmp_path / "straight", make_spec(1, tap), **options, park_every=99.0)
    events = unbroken.run()
    backs = [event["step"] for event in events if event["event"] == "back"]
    assert backs
    assert one(events, "done")["dev_loss_after"] < one(events, "done")["dev_loss_before"]
    killed = Trainer(tmp_path / "killed", make_spec(1, tap), **options)
    killed.run(min(backs[0] + 4, 20))
    killed.run()
    assert killed.output.read_bytes() == unbroken.output.read_bytes()


def test_told_to_end_it_writes_where_it_is_first(
    tap: Path, make_spec: Any, straight: Any, run_trainer: Any, tmp_path: Path
) -> None:
    _, adapter = straight(make_spec, True)
    trainer = Trainer(tmp_path / "ended", make_spec(1, tap), park_every=99.0)
    (tmp_path / "spec.json").write_text(json.dumps(trainer.spec))
    command = [sys.executable, "-m", "agentd.trainer", str(tmp_path / "spec.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        steps = []
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                steps.append(event["step"])
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert not trainer.output.exists()
    assert TrainingState.read(trainer.state).header["place"]["step"] == steps[-1] < STEPS
    assert one(trainer.run(), "resumed")["step"] == steps[-1]
    assert trainer.output.read_bytes() == adapter


def test_what_does_not_belong_to_it_or_is_damaged_is_not_gone_on_from(
    tap: Path, make_spec: Any, tmp_path: Path, reviews: Any
) -> None:
    trainer = Trainer(tmp_path / "first", make_spec(1, tap))
    trainer.run(5)
    whole, was = trainer.state.read_bytes(), dict(trainer.spec)
    fewer = {"train": [0, 1, 2, 3, 5], "starts": [reviews.starts[i] for i in (0, 1, 2, 3, 5, 6, 7)]}
    for change, reason in (
        ({"identity": "b"}, "another training: model and examples"),
        (fewer, "another training: examples"),
        ({"options": {**OPTIONS, "lr": 1e-3}}, "another training: plan"),
        ({}, "damaged"),
    ):
        data = bytearray(whole)
        data[-100] ^= not change
        trainer.state.write_bytes(data)
        trainer.spec = {**was, **change}
        events = trainer.run(1)
        assert reason in one(events, "anew")["reason"]
        assert first_step(events) == 1


def test_a_full_disk_is_told_and_training_goes_on(
    tap: Path, make_spec: Any, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = straight(make_spec, True)
    monkeypatch.setattr("agentd.trainer.parking._SPARE", 1 << 62)
    trainer = Trainer(tmp_path / "full", make_spec(1, tap))
    events = trainer.run()
    assert "free" in next(event["reason"] for event in events if event["event"] == "unsaved")
    assert not trainer.state.exists()
    assert trainer.output.read_bytes() == adapter
