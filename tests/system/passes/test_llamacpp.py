"""Whole passes of engine llama.cpp in a real daemon: real sockets, real processes, and kill -9."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest

from agentd.revision.files import RevisionFiles
from agentd.store import revisions, trials
from agentd.store.database import Store
from agentd.store.revisions import Revision
from tests.support.tiny_passes import LETTERS, LLAMACPP, Learner, adapt, begin, examples, finished, progress, roll, said
from tests.support.tiny_passes import gguf as write_model
from tools.daemon import DaemonProcess, eventually, lives

pytestmark = pytest.mark.slow

FLIPPED = {"yes": LETTERS["no"], "no": LETTERS["yes"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def daemon(model: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(model, LLAMACPP) as process:
        yield process.start()


Answers = list[tuple[str, list[float]]]


@pytest.fixture(scope="module")
def base_answers(daemon: DaemonProcess) -> Answers:
    return said(daemon)


def serving(daemon: DaemonProcess) -> int:
    revision: int = daemon.status()["revision"]
    return revision


class Client(threading.Thread):
    """Asks all the time, as somebody would who knows nothing of passes."""

    def __init__(self, daemon: DaemonProcess) -> None:
        super().__init__()
        self.daemon_process, self.stopping = daemon, threading.Event()
        self.answers: list[tuple[int, str, int]] = []

    def run(self) -> None:
        while not self.stopping.wait(0.2):
            answer = self.daemon_process.ask("What now?", max_tokens=3)
            text = answer.json["choices"][0]["message"]["content"] if answer.status == 200 else ""
            self.answers.append((answer.status, text, answer.json.get("agentd", {}).get("revision", -1)))


@pytest.fixture(scope="module")
def adapted(daemon: DaemonProcess, base_answers: Answers) -> tuple[dict[str, Any], Client]:
    """The row of a committed pass, which a client asked through."""
    assert daemon.post("/v1/examples", examples(160)).status == 200
    client = Client(daemon)
    client.start()
    try:
        row = adapt(daemon, method="elasticzo", blocks=1, zo_steps=2)
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
    record = daemon.get(f"/admin/passes/{row['id']}", admin=True).json
    assert {step["phase"] for step in record["steps"]} == {"bp", "zo"}
    assert "swapped" in {event["kind"] for event in record["events"]}
    counts = daemon.get("/admin/examples", admin=True).json["counts"]["reviews"]
    assert (counts["train"]["new"], counts["train"]["used"]) == (0, row["n_train"])


def test_no_client_was_kept_waiting_or_misled(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], base_answers: Answers
) -> None:
    row, client = adapted
    assert len(client.answers) > 5
    assert {status for status, _, _ in client.answers} == {200}
    expected = {0: base_answers[0][0], row["revision"]: said(daemon)[0][0]}
    assert all(text == expected[revision] for _, text, revision in client.answers)
    revisions_in_order = [revision for _, _, revision in client.answers]
    assert revisions_in_order == sorted(revisions_in_order)  # never back to the old one


def test_back_and_forward_token_for_token(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], base_answers: Answers
) -> None:
    revision = adapted[0]["revision"]
    new = said(daemon)
    assert new != base_answers
    for target, answers in ((0, base_answers), (revision, new)):
        swapped = daemon.post("/admin/rollback", {"revision": target}, admin=True)
        assert swapped.status == 200, swapped.body
        assert swapped.json["swap_ms"] > 0
        assert said(daemon) == answers
    history = daemon.get("/admin/history", admin=True).json["activations"]
    assert [row["revision"] for row in history] == [revision, 0, revision]


def test_embeddings_are_those_of_the_serving_revision(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client]
) -> None:
    def embed() -> tuple[list[float], int]:
        answer = daemon.post("/v1/embeddings", {"input": "aaaaaa"}).json
        return answer["data"][0]["embedding"], answer["agentd"]["revision"]

    revision = adapted[0]["revision"]
    new = embed()
    roll(daemon, 0)
    base = embed()
    roll(daemon, revision)
    assert (new[1], base[1]) == (revision, 0)
    assert base[0] != new[0]
    assert embed() == new


def test_the_files_are_standard_and_the_zeroth_order_part_is_kept_only_if_it_helped(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client]
) -> None:
    directory = daemon.state / "revisions" / str(adapted[0]["revision"])
    adapter = gguf.GGUFReader(directory / "adapter.gguf")
    assert adapter.fields["general.type"].contents() == "adapter"
    assert {tensor.name.split(".")[1] for tensor in adapter.tensors} == {"3"}  # the last of four blocks
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *manifest["files"]}
    assert ("control.gguf" in manifest["files"]) == ("ledger" in manifest["files"]) == (manifest["zo_steps"] > 0)


def test_after_a_restart_the_revision_serves_again(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client]
) -> None:
    before = said(daemon)
    assert daemon.stop() == 0
    daemon.start()
    assert said(daemon) == before
    assert serving(daemon) == adapted[0]["revision"]


def give_feedback(daemon: DaemonProcess, n: int) -> list[str]:
    ids = []
    for i in range(n):
        answer = daemon.ask(f"Review {i}: what a film!", metadata={"task": "reviews"})
        reply = daemon.post("/v1/feedback", {"inference_id": answer.json["id"], "kind": "label", "value": "yes"})
        assert reply.status == 201
        ids.append(reply.json["id"])
    return ids


@pytest.mark.parametrize(
    ("name", "phase", "reason"),
    [
        ("engine", "tap", "engine"),
        ("engine", "gate", "engine"),
        ("daemon", "tap", "the daemon stopped"),
    ],
)
def test_kill_9_in_the_middle_of_a_pass(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], name: str, phase: str, reason: str
) -> None:
    """What the trainer's end costs is the matter of test_memory_control.py, the daemon's while it trains that of
    test_parked.py: the pass goes on."""
    assert daemon.post("/v1/examples", examples(200, 1000, length=150)).status == 200  # phases that can be met
    before = said(daemon)
    feedback = give_feedback(daemon, 3)
    number = begin(daemon, method="suffix-bp", blocks=1)
    eventually(lambda: progress(daemon)["phase"] == phase or progress(daemon)["done"], 60)
    others = psutil.Process(daemon.pid).children(recursive=True)
    os.kill(daemon.pids()[name], signal.SIGKILL)
    if name == "daemon":
        daemon.wait()
        eventually(lambda: not any(map(lives, others)))
        daemon.start()
    row = finished(daemon, number)
    assert (row["state"], reason in row["reason"]) == ("failed", True), row
    eventually(lambda: daemon.get("/health").status == 200)
    assert said(daemon) == before
    stored = {f["id"] for f in daemon.get("/admin/feedback?limit=1000", admin=True).json["feedback"]}
    assert set(feedback) <= stored
    assert sorted(path.name for path in (daemon.state / "revisions").iterdir()) == ["1"]
    again = begin(daemon, method="suffix-bp", blocks=1)  # it may run again
    eventually(lambda: progress(daemon)["id"] == again and progress(daemon)["phase"] == "tap", 60)
    assert daemon.post("/admin/cancel", admin=True).status == 200
    assert finished(daemon, again)["reason"] == "cancelled by the owner"
    at_once = begin(daemon)
    assert daemon.post("/admin/cancel", admin=True).status == 200
    assert finished(daemon, at_once)["state"] == "failed"


def test_a_pass_on_flipped_labels_is_rejected(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], model: Path
) -> None:
    """All that is new is wrong, its holdout too; what judged the revision that serves speaks against it."""
    before, revision = said(daemon), serving(daemon)
    settings = {**LLAMACPP, "adapt": {**LLAMACPP["adapt"], "gate": {"max_drift": 100}, "max_examples": 96}}
    daemon.configure(model, settings)
    os.kill(daemon.pid, signal.SIGHUP)
    assert daemon.post("/v1/examples", examples(110, 5000, letters=FLIPPED)).json["added"] == 110
    row = adapt(daemon, method="suffix-bp", blocks=1)
    assert row["state"] == "rejected", row["gate"]
    assert "lost" in row["reason"] or "no task improved" in row["reason"]
    assert row["gate"]["tasks"]["reviews"]["n"] > 40
    assert (said(daemon), serving(daemon)) == (before, revision)


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
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], model: Path
) -> None:
    assert daemon.stop() == 0
    number = put_on_trial(daemon, attempts=2)
    trial = {"duration": "1h", "max_latency": 100}
    daemon.configure(model, {**LLAMACPP, "adapt": {**LLAMACPP["adapt"], "trial": trial}})
    daemon.start()
    eventually(lambda: serving(daemon) == number, 30)
    assert daemon.status()["trial"]["attempts_left"] == 1
    daemon.kill()
    daemon.start()
    eventually(lambda: progress(daemon)["done"], 30)
    assert progress(daemon)["outcome"] == "rolled_back"
    assert "no attempts left" in progress(daemon)["reason"]
    assert serving(daemon) == 1


def test_a_damaged_revision_is_not_served_and_its_parent_is(
    daemon: DaemonProcess, adapted: tuple[dict[str, Any], Client], base_answers: Answers
) -> None:
    daemon.kill()
    adapter = daemon.state / "revisions" / "1" / "adapter.gguf"
    data = bytearray(adapter.read_bytes())
    data[len(data) // 2] ^= 1
    adapter.write_bytes(data)
    daemon.start()
    assert said(daemon) == base_answers
    kinds = [event["kind"] for event in daemon.get("/admin/events?limit=1000", admin=True).json["events"]]
    assert "revision corrupt" in kinds


def test_an_adapter_that_drifts_too_far_gives_up_no_more_than_it_has_to(model: Path) -> None:
    most = 0.05  # nats per token
    gate = {**LLAMACPP["adapt"]["gate"], "max_drift": most}
    settings = {**LLAMACPP, "adapt": {**LLAMACPP["adapt"], "gate": gate, "max_examples": 96}}
    with Learner(model, settings).start() as daemon:
        assert daemon.post("/v1/examples", examples(110, 0)).status == 200
        row = adapt(daemon, method="suffix-bp", blocks=2)
        events = daemon.get(f"/admin/passes/{row['id']}", admin=True).json["events"]
        assert [event for event in events if event["kind"] == "shortened"]
        assert 0.6 * most < row["gate"]["drift"] <= most
