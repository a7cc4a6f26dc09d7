"""A classifier's pass from plan to trial: in a real daemon with a turned camera, and the planner by itself."""

import asyncio
import hashlib
import os
import re
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from agentd.adapt.kinds.int8 import plan
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.trial.trial import TrialWatch
from agentd.config.schema import Config, MemorySettings, TrialSettings, load
from agentd.engine.canaries import zeros
from agentd.engine.int8.engine import Int8Engine
from agentd.engine.protocol import Classification
from agentd.errors import AgentdError, EngineDied, PassRefused
from agentd.int8 import sign_ledger
from agentd.int8.header import read_classifier
from agentd.int8.weights import load_int8
from agentd.store import imports
from agentd.store.database import Store
from agentd.store.examples import NewExample
from tests.support.int8_samples import CLASSES, classifier, images
from tools.daemon import DaemonProcess, eventually

SETTINGS: dict[str, Any] = {
    "engine": "int8",
    "tasks": None,
    "adapt": {"trial": {"duration": "300ms"}, "method": "elasticzo", "blocks": 2, "zo_steps": 200},
}


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(classifier(), SETTINGS) as daemon:
        yield daemon.start()


def ask(daemon: DaemonProcess, image: Tensor) -> dict[str, Any]:
    headers = {"content-type": "application/octet-stream"}
    answer = daemon.post("/v1/classify?shape=1,12,12&dtype=uint8", image.numpy().tobytes(), headers=headers)
    assert answer.status == 200, answer.body
    classification: dict[str, Any] = answer.json
    return classification


def ask_all(daemon: DaemonProcess, x: Tensor) -> list[dict[str, float]]:
    return [ask(daemon, image)["probabilities"] for image in x]


def accuracy(daemon: DaemonProcess, x: Tensor, labels: Tensor) -> float:
    answers = [max(probabilities, key=probabilities.__getitem__) for probabilities in ask_all(daemon, x)]
    return sum(a == CLASSES[b] for a, b in zip(answers, labels.tolist(), strict=True)) / len(answers)


def teach(daemon: DaemonProcess, n: int, seed: int = 31) -> None:
    x, labels = images(n, seed, turned=True)
    for image, label in zip(x, labels.tolist(), strict=True):
        body = {"inference_id": ask(daemon, image)["id"], "kind": "label", "value": CLASSES[label]}
        assert daemon.post("/v1/feedback", body).status == 201


def adapt(daemon: DaemonProcess, **options: Any) -> dict[str, Any]:
    answer = daemon.post("/admin/adapt", options, admin=True)
    assert answer.status == 202, answer.body
    number = answer.json["pass"]
    eventually(lambda: daemon.get("/admin/progress", admin=True).json["pass"]["done"], 60)
    report: dict[str, Any] = daemon.get(f"/admin/passes/{number}", admin=True).json
    return report


def test_a_turned_camera_is_learned_and_can_be_taken_back(daemon: DaemonProcess) -> None:
    x, labels = images(60, 32, turned=True)
    before, old = accuracy(daemon, x, labels), ask_all(daemon, x[:20])
    teach(daemon, 160)
    report = adapt(daemon)
    row = report["pass"]
    assert (row["state"], row["method"], row["blocks"], row["revision"]) == ("committed", "elasticzo", 2, 1), row
    assert row["gate"]["tasks"]["classify"]["after"]["accuracy"] > before + 0.2
    assert row["gate"]["drift"] is None
    assert 0 < row["n_train"] < 160
    assert {step["projected_gradient"] for step in report["steps"]} >= {-1.0, 1.0}
    assert any(step["dev_loss"] is not None for step in report["steps"])
    assert daemon.status()["revision"] == 1
    assert accuracy(daemon, x, labels) > before + 0.2
    new = ask_all(daemon, x[:20])

    back = daemon.post("/admin/rollback", {}, admin=True).json
    assert (back["revision"], back["previous"]) == (0, 1)
    assert ask_all(daemon, x[:20]) == old
    daemon.post("/admin/rollback", {"revision": 1}, admin=True)
    assert ask_all(daemon, x[:20]) == new
    reasons = [row["reason"] for row in daemon.get("/admin/history", admin=True).json["activations"]]
    assert len(reasons) == 3

    # What serves survives a kill, and so does the engine's memory of it.
    daemon.kill()
    daemon.start()
    assert ask_all(daemon, x[:20]) == new


def test_examples_that_cannot_be_used_are_named_once_and_start_nothing(daemon: DaemonProcess) -> None:
    teach(daemon, 160)
    daemon.stop()
    with closing(Store(daemon.state / "agentd.db")) as store:
        store.do(
            imports.add_many,
            [
                NewExample("classify", "label", {"prompt": f"no image {n}"}, CLASSES[n % len(CLASSES)])
                for n in range(60)
            ],
        )
    daemon.start()
    assert daemon.status()["next_trigger"]["new_examples"] > 150
    first = adapt(daemon)
    assert first["pass"]["state"] == "committed", first
    named = [event["message"] for event in first["events"] if event["kind"] == "unusable"]
    assert len(named) == 21
    assert "40 more examples" in named[-1]
    status = daemon.status()
    assert status["unusable_examples"] == {"classify": 60}
    assert status["next_trigger"]["new_examples"] == 0, "nothing is left that a pass could learn"
    teach(daemon, 10, seed=77)
    second = adapt(daemon)
    assert not [event for event in second["events"] if event["kind"] == "unusable"]


def test_the_revision_is_its_parent_and_its_ledger(daemon: DaemonProcess) -> None:
    teach(daemon, 160)
    assert adapt(daemon)["pass"]["state"] == "committed"
    folder = daemon.state / "revisions" / "1"
    manifest = daemon.get("/admin/revisions/1", admin=True).json["manifest"]
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
    signs = sign_ledger.decode((folder / "ledger").read_bytes())
    assert len(signs.steps) == manifest["zo_steps"] > 0
    replayed, stored = load_int8(classifier()), load_int8(folder / "network.safetensors")
    sign_ledger.replay(signs, replayed)
    cutoff = stored.architecture.cutoff(signs.bp_layers)
    trunk = [p for p in stored.described if p.layer < cutoff]
    assert trunk
    for p in trunk:
        a, b = (network.parameters[p.index].mantissa.numpy().tobytes() for network in (replayed, stored))
        assert a == b

    # A network that is not what was written does not serve.
    x, _ = images(10, 33)
    daemon.kill()
    data = bytearray((folder / "network.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "network.safetensors").write_bytes(data)
    daemon.start()
    assert {ask(daemon, image)["agentd"]["revision"] for image in x} == {0}
    kinds = [event["kind"] for event in daemon.get("/admin/events?limit=1000", admin=True).json["events"]]
    assert "revision corrupt" in kinds


def test_a_candidate_that_is_no_better_is_rejected(daemon: DaemonProcess) -> None:
    teach(daemon, 150)
    row = adapt(daemon, method="mezo", blocks=0, zo_steps=1)["pass"]
    assert row["state"] == "rejected", row
    assert "no task improved significantly" in row["reason"]
    assert daemon.status()["revision"] == 0
    assert daemon.get("/admin/revisions", admin=True).json["revisions"][0]["serving"]


def test_requests_are_answered_while_it_learns_and_an_engine_that_dies_fails_the_pass(daemon: DaemonProcess) -> None:
    teach(daemon, 160)
    number = daemon.post("/admin/adapt", {"zo_steps": 100_000}, admin=True).json["pass"]

    def step() -> int:
        return int(daemon.get("/admin/progress", admin=True).json["pass"]["step"])

    def phase() -> bool:
        return bool(daemon.get("/admin/progress", admin=True).json["pass"]["phase"] == "zo")

    eventually(phase, 20)
    image = images(1, 35)[0][0]
    first = step()
    answers = [ask(daemon, image) for _ in range(30)]
    assert {answer["agentd"]["revision"] for answer in answers} == {0}
    eventually(lambda: step() > first + 20, 20)
    (engine,) = _engines(daemon.pid)
    os.kill(engine, signal.SIGKILL)
    eventually(lambda: daemon.get("/admin/progress", admin=True).json["pass"]["done"], 30)
    assert daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]["state"] == "failed"
    assert ask(daemon, image)["probabilities"] == answers[0]["probabilities"]


def _engines(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children() if "agentd.engine.process.runner" in child.cmdline()]


# --- the planner


def planned(config: Config, **options: Any) -> tuple[str, int]:
    setting = plan(config, read_classifier(classifier()), Dataset([], {}), options)
    return setting.method, setting.blocks


def test_the_dial_goes_as_high_as_memory_and_wish_allow(tmp_path: Path) -> None:
    config = load(None, {"AGENTD_STATE_DIR": str(tmp_path)})
    assert planned(config) == ("suffix-bp", 3)  # all layers: full backpropagation
    assert planned(config, blocks=1) == ("elasticzo", 1)
    assert planned(config, blocks=0) == ("mezo", 0)
    assert planned(config, method="elasticzo") == ("elasticzo", 2)
    assert planned(config, method="mezo") == ("mezo", 0)
    assert planned(config, method="suffix-bp", blocks=1) == ("suffix-bp", 1)

    def limited(method: str, k: int) -> Config:
        header = read_classifier(classifier())
        needed = plan(config, header, Dataset([], {}), {"method": method, "blocks": k}).needed
        return config.model_copy(update={"memory": MemorySettings(limit=needed)})

    assert planned(limited("elasticzo", 1)) == ("elasticzo", 1)
    assert planned(limited("mezo", 0)) == ("mezo", 0)
    with pytest.raises(PassRefused, match="short") as refused:
        planned(config.model_copy(update={"memory": MemorySettings(limit=1000)}))
    assert refused.value.shortfall > 1000


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"blocks": 4}, "4 layers were asked for, and the model has 3"),
        ({"method": "mezo", "blocks": 1}, "mezo does not go with k = 1"),
        ({"method": "elasticzo", "blocks": 0}, "elasticzo does not go with k = 0"),
        ({"method": "elasticzo", "blocks": 3}, "elasticzo does not go with k = 3"),
        ({"method": "blockwise-bp"}, "no method 'blockwise-bp'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    config = load(None, {"AGENTD_STATE_DIR": str(tmp_path)})
    with pytest.raises(PassRefused, match=complaint):
        planned(config, **options)


def test_the_trial_s_canary_is_an_input_of_the_model() -> None:
    answer = Int8Engine(classifier()).classify(zeros((1, 12, 12)))
    assert sum(answer.probabilities) == pytest.approx(1)


class Faulty:
    """An engine on trial whose answers are wrong: as one whose revision does harm would be."""

    def __init__(self, outcome: Classification | AgentdError) -> None:
        self.info, self.restarts, self._outcome = Int8Engine(classifier()).info, 0, outcome

    async def classify(self, input: dict[str, Any]) -> Classification:
        if isinstance(self._outcome, AgentdError):
            raise self._outcome
        return self._outcome


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (Classification([0.25] * 4, 1), None),
        (Classification([float("nan")] * 4, 1), "do not add up to one"),
        (Classification([0.5] * 4, 1), "do not add up to one"),
        (EngineDied("killed by SIGKILL"), "a canary prompt failed: .*SIGKILL"),
    ],
)
def test_a_trial_ends_at_the_first_wrong_answer(outcome: Classification | AgentdError, problem: str | None) -> None:
    trial = TrialWatch(Faulty(outcome), TrialSettings(duration=0))  # type: ignore[arg-type]  # all that a trial asks for
    complaint = asyncio.run(trial.run())
    if problem is None:
        assert complaint is None
    else:
        assert complaint is not None
        assert re.search(problem, complaint)
