"""Recall judged by a daemon itself: three corrections, no request, and a verdict that is shown and survives."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_passes import gguf
from tools.daemon import DaemonProcess, eventually

SETTINGS: dict[str, Any] = {
    "model": {"context": 4096},
    "adapt": {
        "enabled": True,
        "trigger": {"idle": 0.1, "check": 0.1, "min_examples": 10**6},
        "gate": {"min_holdout": 10**6},
    },
    "tasks": {"off": {"recall": "off"}, "free": {"metric": "loss"}, "codes": {"metric": "exact"}},
}


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def daemon(real_model: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(real_model, SETTINGS) as process:
        process.start()
        lines = [
            {"task": task, "messages": [said(f"number {n}")], "completion": "zq zq zq zq"}
            for task in ("free", "off", "codes")
            for n in range(8)
        ]
        assert process.post("/v1/examples", b"\n".join(json.dumps(line).encode() for line in lines)).status == 200
        yield process


def recall(daemon: DaemonProcess, task: str) -> dict[str, Any]:
    rows = daemon.get("/admin/tasks", admin=True).json["tasks"]
    about: dict[str, Any] = next(row["recall"] for row in rows if row["name"] == task)
    return about


def test_it_is_switched_on_where_it_helps_and_says_so(daemon: DaemonProcess) -> None:
    eventually(lambda: recall(daemon, "free")["decided_at"], 60)
    about = recall(daemon, "free")
    # The same answer each time: with others of it in sight the model finds it likelier.
    assert about["on"], about
    assert about["figures"]["measure"] == "loss"
    assert about["figures"]["source"] == "corrections"
    assert about["k"] in (1, 2, 4, 8)
    assert daemon.ask("number 3", metadata={"task": "free"}).json["agentd"]["recalled"]
    events = [event["message"] for event in daemon.get("/admin/events", admin=True).json["events"]]
    assert any(message.startswith("task free: on: loss") for message in events)
    eventually(lambda: recall(daemon, "codes")["decided_at"], 60)
    assert recall(daemon, "codes")["figures"]["measure"] == "accuracy"


def test_what_is_off_is_not_judged_and_a_verdict_survives(daemon: DaemonProcess) -> None:
    eventually(lambda: recall(daemon, "codes")["decided_at"], 60)
    eventually(lambda: recall(daemon, "free")["waits_for"] is None, 60)
    before = recall(daemon, "free")
    assert recall(daemon, "off")["decided_at"] is None
    daemon.stop()
    daemon.start()
    assert recall(daemon, "free") == before
    assert not list((daemon.state / "passes").glob("recall/*"))


def test_a_board_that_is_never_idle_gets_its_verdict(tmp_path: Path) -> None:
    trigger = {"idle": "1h", "latest": "1h", "check": "100ms", "min_examples": 10**6}
    settings = {"adapt": {"enabled": True, "trigger": trigger, "gate": {"min_holdout": 10**6}}}
    model = gguf(tmp_path)
    with DaemonProcess(model, settings) as daemon:
        daemon.start()

        def correct(n: int) -> None:
            said = daemon.ask(f"number {n}", max_tokens=2, metadata={"task": "codes"}).json["id"]
            value = {"inference_id": said, "kind": "label", "value": ("yes", "no")[n % 2], "task": "codes"}
            assert daemon.post("/v1/feedback", value).status == 201

        correct(1)
        eventually(lambda: recall(daemon, "codes")["waits_for"] == "2 more corrections", 30)
        for n in range(2, 14):
            correct(n)
        eventually(lambda: "without a request" in (recall(daemon, "codes")["waits_for"] or ""), 30)
        assert "judged all the same" in recall(daemon, "codes")["reason"]
        trigger["latest"] = "0s"
        daemon.configure(model, settings)
        os.kill(daemon.pid, signal.SIGHUP)
        eventually(lambda: daemon.ask("again", max_tokens=2) and recall(daemon, "codes")["decided_at"], 60)
        assert recall(daemon, "codes")["figures"]["n"] > 0
