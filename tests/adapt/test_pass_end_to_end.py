"""Whole passes in a real daemon: real model, real reviews, real sockets, real processes, and kill -9."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
from daemon_process import DaemonProcess, eventually

from agentd.adapt.revision_files import RevisionFiles
from agentd.store import revisions, trials
from agentd.store.database import Store
from agentd.store.revisions import Revision

pytestmark = pytest.mark.slow

REVIEWS = Path(__file__).parent.parent.parent / "tools" / "data" / "movie_reviews.jsonl"
ANSWERS = {"positive": "yes", "negative": "no"}
QUESTIONS = ["What is the capital of France?", "Write one sentence about the sea.", "Name a colour."]
SETTINGS: dict[str, Any] = {
    "adapt": {"enabled": False, "trial": {"duration": "1s"}, "gate": {"alpha": 0.2}},
    "serve": {"slots": 2},
}


FLIPPED = {"positive": "no", "negative": "yes"}


def examples(n: int, first: int = 0, answers: dict[str, str] = ANSWERS) -> bytes:
    rows = (json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines())
    train = [row for row in rows if row["split"] == "train"][first : first + n]
    lines = [json.dumps({"task": "reviews", "text": row["text"], "label": answers[row["label"]]}) for row in train]
    return "\n".join(lines).encode()


def texts(daemon: DaemonProcess) -> list[tuple[str, int]]:
    """Greedy answers, each with the revision that gave it."""
    answers = [daemon.ask(question, max_tokens=12).json for question in QUESTIONS]
    return [(answer["choices"][0]["message"]["content"], answer["agentd"]["revision"]) for answer in answers]


def progress(daemon: DaemonProcess) -> dict[str, Any]:
    found: dict[str, Any] = daemon.get("/admin/progress", admin=True).json["pass"] or {"done": False, "phase": None}
    return found


def adapt(daemon: DaemonProcess, **options: Any) -> int:
    answer = daemon.post("/admin/adapt", options, admin=True)
    assert answer.status == 202, answer.body
    return int(answer.json["pass"])


def finished(daemon: DaemonProcess, number: int, timeout: float = 500) -> dict[str, Any]:
    """The pass's row, once it has ended. How long its phases took is written a moment after its end."""

    def look() -> dict[str, Any] | None:
        row: dict[str, Any] = daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]
        time.sleep(0.2)
        return row if row["finished_at"] else None

    assert eventually(look, timeout) is not None
    time.sleep(0.3)
    row: dict[str, Any] = daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]
    return row


def swap(daemon: DaemonProcess, revision: int) -> dict[str, Any]:
    answer = daemon.post("/admin/rollback", {"revision": revision}, admin=True)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


@pytest.fixture(scope="module")
def daemon(model_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(model_path, SETTINGS) as process:
        yield process.start()


@pytest.fixture(scope="module")
def base_answers(daemon: DaemonProcess) -> list[tuple[str, int]]:
    return texts(daemon)


class Client(threading.Thread):
    """Asks all the time, as somebody would who knows nothing of passes."""

    def __init__(self, daemon: DaemonProcess) -> None:
        super().__init__()
        self.daemon_process, self.stopping = daemon, threading.Event()
        self.answers: list[tuple[int, str, int]] = []

    def run(self) -> None:
        while not self.stopping.wait(1.5):
            answer = self.daemon_process.ask(QUESTIONS[0], max_tokens=12)
            text = answer.json["choices"][0]["message"]["content"] if answer.status == 200 else ""
            self.answers.append((answer.status, text, answer.json.get("agentd", {}).get("revision", -1)))


@pytest.fixture(scope="module")
def adapted(daemon: DaemonProcess, base_answers: list[tuple[str, int]]) -> tuple[dict[str, Any], Client]:
    """The row of a committed pass, which a client asked through."""
    assert daemon.post("/v1/examples", examples(160)).status == 200
    client = Client(daemon)
    client.start()
    try:
        row = finished(daemon, adapt(daemon, method="elasticzo", blocks=1, zo_steps=2))
    finally:
        client.stopping.set()
        client.join()
    assert row["state"] == "committed", row["reason"]
    return row, client


def test_the_pass_is_committed_with_everything_recorded(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client]
) -> None:
    row, _ = adapted
    assert (row["method"], row["blocks"], row["parent_revision"]) == ("elasticzo", 1, 0)
    assert row["n_train"] + row["n_holdout"] == 160
    assert {"plan", "tap", "train", "zo", "gate", "stage", "swap", "trial"} <= row["phases"].keys()
    assert {"daemon", "engine", "trainer", "total"} <= row["peaks"].keys()
    assert row["predicted_bytes"] == sum(row["predicted"].values())
    assert row["gate"]["tasks"]["reviews"]["after"]["loss"] < row["gate"]["tasks"]["reviews"]["before"]["loss"]
    found = daemon.get(f"/admin/passes/{row['id']}", admin=True).json
    assert {step["phase"] for step in found["steps"]} == {"bp", "zo"}
    assert "swapped" in {event["kind"] for event in found["events"]}
    counts = daemon.get("/admin/examples", admin=True).json["counts"]["reviews"]
    assert (counts["train"]["new"], counts["train"]["used"]) == (0, row["n_train"])


def test_nobody_was_kept_waiting_or_misled(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], base_answers: list[tuple[str, int]]
) -> None:
    row, client = adapted
    assert len(client.answers) > 10
    assert {status for status, _, _ in client.answers} == {200}
    expected = {0: base_answers[0][0], row["revision"]: texts(daemon)[0][0]}
    assert all(text == expected[revision] for _, text, revision in client.answers)
    served = [revision for _, _, revision in client.answers]
    assert served == sorted(served)  # never back to the old one


def test_back_and_forward_token_for_token(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], base_answers: list[tuple[str, int]]
) -> None:
    revision = adapted[0]["revision"]
    new = texts(daemon)
    assert {r for _, r in new} == {revision}
    assert swap(daemon, 0)["swap_ms"] <= 20
    assert texts(daemon) == base_answers
    assert swap(daemon, revision)["swap_ms"] <= 20
    assert texts(daemon) == new
    history = daemon.get("/admin/history", admin=True).json["activations"]
    assert [row["revision"] for row in history] == [revision, 0, revision]


def test_the_files_are_standard_and_the_zeroth_order_part_is_kept_only_if_it_helped(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client]
) -> None:
    directory = daemon.state / "revisions" / str(adapted[0]["revision"])
    adapter = gguf.GGUFReader(directory / "adapter.gguf")
    assert adapter.fields["general.type"].contents() == "adapter"
    assert {tensor.name.split(".")[1] for tensor in adapter.tensors} == {"29"}
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *manifest["files"]}
    assert ("control.gguf" in manifest["files"]) == ("ledger" in manifest["files"]) == (manifest["zo_steps"] > 0)


def test_after_a_restart_the_revision_serves_again(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client]
) -> None:
    before = texts(daemon)
    assert daemon.stop() == 0
    daemon.start()
    assert texts(daemon) == before
    assert {revision for _, revision in before} == {adapted[0]["revision"]}


def give_feedback(daemon: DaemonProcess, n: int) -> list[str]:
    ids = []
    for i in range(n):
        answer = daemon.ask(f"Review {time.time_ns()} {i}: what a film!", metadata={"task": "reviews"})
        reply = daemon.post("/v1/feedback", {"inference_id": answer.json["id"], "kind": "label", "value": "yes"})
        assert reply.status == 201
        ids.append(reply.json["id"])
    return ids


def victim(daemon: DaemonProcess, name: str) -> int | None:
    if name == "daemon":
        return daemon.pid
    for child in psutil.Process(daemon.pid).children():
        if f"agentd.{name}.runner" in child.cmdline():
            return child.pid
    return None


@pytest.mark.parametrize(
    ("name", "phase", "reason"),
    [
        ("engine", "tap", "engine"),
        ("engine", "gate", "engine"),
        ("daemon", "tap", "the daemon stopped"),
        ("daemon", "train", "the daemon stopped"),
    ],
)
def test_kill_9_in_the_middle_of_a_pass(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], name: str, phase: str, reason: str
) -> None:
    """What the trainer's end costs is the matter of test_dial_end_to_end.py: the pass goes on."""
    before = texts(daemon)
    given = give_feedback(daemon, 3)
    number = adapt(daemon, blocks=1, zo_steps=0)
    eventually(lambda: progress(daemon)["phase"] == phase or progress(daemon)["done"], 120)
    assert not progress(daemon)["done"], progress(daemon)["reason"]
    pid = eventually(lambda: victim(daemon, name))
    assert pid is not None
    others = psutil.Process(daemon.pid).children(recursive=True)
    given += give_feedback(daemon, 2)
    os.kill(pid, signal.SIGKILL)
    if name == "daemon":
        daemon.wait()
        _, alive = psutil.wait_procs(others, timeout=10)
        assert not alive, alive
        daemon.start()
    row = finished(daemon, number, 60)
    assert row["state"] == "failed"
    assert reason in row["reason"]
    assert texts(daemon) == before
    stored = {f["id"] for f in daemon.get("/admin/feedback?limit=1000", admin=True).json["feedback"]}
    assert set(given) <= stored
    assert sorted(path.name for path in (daemon.state / "revisions").iterdir()) == ["1"]
    again = adapt(daemon, blocks=1, zo_steps=0)  # it may run again
    eventually(lambda: progress(daemon)["id"] == again and progress(daemon)["phase"] == "tap", 60)
    assert daemon.post("/admin/cancel", admin=True).status == 200
    assert finished(daemon, again, 30)["reason"] == "cancelled by the owner"


def test_a_pass_on_flipped_labels_is_rejected(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], model_path: Path
) -> None:
    """All that is new is wrong, its holdout too; what judged the revision that serves speaks against it. The gate is as
    users have it: with the loose one of the other tests, a pass that changes next to nothing may be taken."""
    before = texts(daemon)
    daemon.configure(model_path, {**SETTINGS, "adapt": {**SETTINGS["adapt"], "gate": {}, "max_examples": 96}})
    os.kill(daemon.pid, signal.SIGHUP)
    assert daemon.post("/v1/examples", examples(110, 160, FLIPPED)).json["added"] == 110
    row = finished(daemon, adapt(daemon, method="suffix-bp", blocks=1, zo_steps=0))
    assert row["state"] == "rejected", row["gate"]
    facts = row["gate"]["tasks"]["reviews"]
    assert "lost" in row["reason"] or "no task improved" in row["reason"]
    assert facts["n"] > 40
    assert texts(daemon) == before


def put_on_trial(daemon: DaemonProcess, attempts: int) -> int:
    """Leaves the state of a stopped daemon as a kill in the middle of a trial would have left it."""
    store = Store(daemon.state / "agentd.db")
    files = RevisionFiles(daemon.state / "revisions", "")
    number = store.do(revisions.next_id)
    shutil.copytree(files.directory(1), files.directory(number))
    row = Revision(number, 1, None, "2026-01-01T00:00:00Z", "trial", None, "elasticzo", 1, None, {})
    store.do(revisions.add, row)
    store.do(trials.start, number, None, attempts)
    store.close()
    return number


def test_a_trial_survives_restarts_until_its_attempts_are_spent(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], model_path: Path
) -> None:
    assert daemon.stop() == 0
    number = put_on_trial(daemon, attempts=2)
    daemon.configure(model_path, {**SETTINGS, "adapt": {**SETTINGS["adapt"], "trial": {"duration": "1h"}}})
    daemon.start()
    eventually(lambda: texts(daemon)[0][1] == number, 30)
    assert daemon.status()["trial"]["attempts_left"] == 1
    daemon.kill()
    daemon.start()
    eventually(lambda: progress(daemon)["done"], 30)
    assert progress(daemon)["outcome"] == "rolled_back"
    assert "no attempts left" in progress(daemon)["reason"]
    assert {revision for _, revision in texts(daemon)} == {1}


def test_a_damaged_revision_is_not_served_and_its_parent_is(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], base_answers: list[tuple[str, int]]
) -> None:
    daemon.kill()
    adapter = daemon.state / "revisions" / "1" / "adapter.gguf"
    data = bytearray(adapter.read_bytes())
    data[len(data) // 2] ^= 1
    adapter.write_bytes(data)
    daemon.start()
    assert texts(daemon) == base_answers
    kinds = [event["kind"] for event in daemon.get("/admin/events?limit=1000", admin=True).json["events"]]
    assert "revision corrupt" in kinds
