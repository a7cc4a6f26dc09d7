"""Recall judged by a daemon itself: three corrections, no request, and a verdict that is shown and survives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
            for n in range(12)
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
    before = recall(daemon, "free")
    assert recall(daemon, "off")["decided_at"] is None
    daemon.stop()
    daemon.start()
    assert recall(daemon, "free") == before
    assert not list((daemon.state / "passes").glob("recall/*"))
