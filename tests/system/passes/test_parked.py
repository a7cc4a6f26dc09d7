"""A pass that a restart cuts short goes on where it was: a real daemon, killed and stopped while its trainer runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.formats.training_state import TrainingState
from agentd.revision.files import ADAPTER
from tests.support.tiny_passes import LLAMACPP, Learner, begin, ctl, examples, finished, gguf, progress
from tools.daemon import DaemonProcess, eventually

pytestmark = pytest.mark.slow

HOW = {"method": "suffix-bp", "blocks": 1, "zo_steps": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture
def daemon(model: Path) -> Iterator[DaemonProcess]:
    with Learner(model, LLAMACPP) as process:
        yield process.start()


def teach(daemon: DaemonProcess) -> None:
    assert daemon.post("/v1/examples", examples(80, 1000, length=150)).status == 200


def steps(daemon: DaemonProcess, at_least: int, phase: str = "train") -> int:
    """How far training is, once it has taken so many steps."""

    def trains() -> bool:
        now = progress(daemon)
        assert not now["done"], now
        return now["phase"] == phase and now["loss"] is not None and now["step"] >= at_least

    eventually(trains, 60)
    return int(progress(daemon)["step"])


def adapter(daemon: DaemonProcess, row: dict[str, Any]) -> bytes:
    assert row["state"] == "committed", row["reason"]
    return (daemon.state / "revisions" / str(row["revision"]) / ADAPTER).read_bytes()


def state(daemon: DaemonProcess) -> Path:
    return daemon.state / "passes" / "1" / "training.state"


def test_cut_short_again_and_again_it_commits_the_adapter_of_an_uninterrupted_pass(
    daemon: DaemonProcess, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teach(daemon)
    number = begin(daemon, **HOW)
    steps(daemon, 1)
    daemon.kill()
    daemon.start()
    reached = steps(daemon, 4)
    assert daemon.stop() == 0
    assert TrainingState.read(state(daemon)).header["place"]["step"] >= reached
    daemon.start()
    assert daemon.post("/v1/examples", examples(20, 5000)).status == 200  # for the next pass
    row = finished(daemon, number, 90)
    interrupted = adapter(daemon, row)
    assert row["resumed"]["times"] == 2
    assert ctl(daemon, "pass", str(number), "--json") == 0
    said = capsys.readouterr().out
    assert said.count('"pass parked"') == said.count('"pass resumed"') == 2
    assert {step["step"] for step in daemon.get("/admin/passes/1", admin=True).json["steps"]} >= set(range(1, reached))
    assert not state(daemon).exists()
    assert daemon.get("/admin/passes", admin=True).json["passes"][0]["id"] == number

    with Learner(model, LLAMACPP) as other:
        other.start()
        teach(other)
        assert adapter(other, finished(other, begin(other, **HOW))) == interrupted


def parked(daemon: DaemonProcess) -> int:
    """A pass of zeroth-order steps that the daemon's end has cut short, and that waits because learning is paused."""
    number = begin(daemon, method="mezo", zo_steps=40)
    steps(daemon, 4, "zo")
    assert daemon.post("/admin/pause", admin=True).status == 200
    assert daemon.stop() == 0
    daemon.start()
    eventually(lambda: "agentctl resume" in progress(daemon).get("message", ""), 20)
    now = progress(daemon)
    assert (now["id"], now["state"], now["done"]) == (number, "parked", False)
    return number


def test_it_waits_while_learning_is_paused_and_does_not_outlive_what_is_forgotten(daemon: DaemonProcess) -> None:
    assert daemon.post("/v1/examples", examples(120)).status == 200
    number = parked(daemon)
    assert daemon.post("/admin/adapt", {}, admin=True).status == 409
    assert daemon.post("/admin/resume", admin=True).status == 200
    row = finished(daemon, number)
    assert row["state"] in ("committed", "rejected"), row["reason"]
    assert row["resumed"]["times"] == 1
    assert not list(state(daemon).parent.glob("*.state"))

    number = parked(daemon)
    example = daemon.get("/admin/examples?limit=1", admin=True).json["examples"][0]["id"]
    answer = daemon.post("/admin/forget", {"examples": [example]}, admin=True)
    assert answer.status == 200, answer.body
    row = finished(daemon, number)
    assert (row["state"], row["reason"]) == ("failed", "feedback is being forgotten")
    assert not list(daemon.state.glob("passes/*/*.state"))
