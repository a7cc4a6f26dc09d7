"""The first automatic pass, as somebody meets it who gives feedback piece by piece and changes no setting."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.adapt.planning.prepare import SIFTED
from tests.support.tiny_passes import finished, gguf
from tools.daemon import DaemonProcess, eventually

# What a person would leave as it is stays: only waiting is shorter.
SETTINGS = {"adapt": {"enabled": True, "trigger": {"idle": "300ms", "check": "200ms"}, "trial": {"duration": "300ms"}}}
WORDS = {"yes": "aaaa", "no": "zzzz"}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(gguf(tmp_path), SETTINGS) as daemon:
        yield daemon.start()


def passes(daemon: DaemonProcess) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = daemon.get("/admin/passes", admin=True).json["passes"]
    return rows


def correct(daemon: DaemonProcess, text: str, kind: str, value: Any, **more: Any) -> None:
    """Asks, and says what would have been right."""
    inference = daemon.ask(text, max_tokens=1).json["id"]
    answer = daemon.post("/v1/feedback", {"inference_id": inference, "kind": kind, "value": value, **more})
    assert answer.status == 201, answer.body


def trigger(daemon: DaemonProcess) -> dict[str, Any]:
    facts: dict[str, Any] = daemon.status()["next_trigger"]
    return facts


@pytest.mark.parametrize("kind", ["label", "demonstration"])
def test_the_first_pass_comes_when_it_can_be_judged(daemon: DaemonProcess, kind: str) -> None:
    told = []
    for n in range(200):
        label = "yes" if n % 2 else "no"
        correct(daemon, f"{WORDS[label]} {n}", kind, label, task="mine")
        facts = trigger(daemon)
        if facts["new_examples"] >= facts["min_examples"]:
            break
        assert passes(daemon) == []
        told.append(facts["missing"]["mine"])
    assert told[5]["until"] == "first pass"
    assert all(entry["more"] for entry in told[1:]), "while a number is missing it is told"
    assert "mine" not in facts["missing"]
    eventually(lambda: passes(daemon), 30)
    row = finished(daemon, 1)
    assert (row["trigger"], row["state"] in ("committed", "rejected")) == ("examples", True), row["reason"]
    assert row["n_holdout"] >= 20
    assert row["n_train"] >= 64
    assert len(row["gate"]["skills"]) == 9
    assert trigger(daemon)["missing"]["mine"]["until"] == "next pass"
    assert len(passes(daemon)) == 1


def test_what_cannot_be_used_is_named_and_starts_no_pass(daemon: DaemonProcess) -> None:
    lines = [
        json.dumps({"task": "long", "text": f"{WORDS[label] * 600} {n}", "label": label})
        for n in range(150)
        for label in (("yes", "no")[n % 2],)
    ]
    answer = daemon.post("/v1/examples", "\n".join(lines).encode())
    assert answer.status == 200, answer.body
    eventually(lambda: daemon.status()["unusable_examples"] == {"long": 150}, 30)
    assert passes(daemon) == []
    events = daemon.get("/admin/events?limit=1000", admin=True).json["events"]
    named = [event["message"] for event in events if event["kind"] == "unusable"]
    assert len(named) == 21
    assert "tokens are more than" in named[0]
    # and the next that can be used starts one
    for n in range(130):
        label = ("yes", "no")[n % 2]
        correct(daemon, f"{WORDS[label]} {n}", "label", label, task="short")
    eventually(lambda: passes(daemon), 30)
    row = finished(daemon, 1)
    assert row["state"] in ("committed", "rejected"), row["reason"]


def test_texts_that_a_crash_left_behind_are_removed(daemon: DaemonProcess) -> None:
    daemon.kill()
    left = daemon.state / "passes" / SIFTED / "examples.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text("what a user has said")
    daemon.start()
    eventually(lambda: not left.parent.exists(), 10)


def test_answers_are_scored_as_they_were_served(daemon: DaemonProcess) -> None:
    """What tasks and history say of answers that were judged, before a crash and after it."""
    for n in range(12):
        text = f"{WORDS['yes']} {n}"
        said = daemon.ask(text, max_tokens=1).json
        right = n % 3 > 0
        answer = {"inference_id": said["id"], "kind": "boolean", "value": right, "task": "reviews"}
        assert daemon.post("/v1/feedback", answer).status == 201
    (task,) = daemon.get("/admin/tasks", admin=True).json["tasks"]
    (day,) = task["scores"]
    assert (day["revision"], day["n"], day["right"]) == (0, 12, 8)
    assert daemon.get("/admin/history", admin=True).json["scores"] == {"reviews": [day]}
    daemon.kill()
    daemon.start()
    assert daemon.get("/admin/history", admin=True).json["scores"] == {"reviews": [day]}
