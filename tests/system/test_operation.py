"""What an owner does to a daemon that runs: reload, backup, restore; and what it keeps to itself. A tiny model."""

import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentd.config import schema as configuration
from agentd.config.reload import FIXED, compare
from agentd.host.crash_loop import LIMIT, StartCounter
from agentd.logs import JournalFormatter
from agentd.store import revisions
from agentd.store.database import Store
from agentd.store.revisions import Revision
from tools import tiny_model
from tools.daemon import DaemonProcess, eventually


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def daemon(model: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(model) as process:
        yield process.start()


def events(daemon: DaemonProcess, kind: str) -> list[dict[str, Any]]:
    return [e for e in daemon.get("/admin/events?limit=1000", admin=True).json["events"] if e["kind"] == kind]


def test_every_key_is_either_live_or_fixed_and_a_change_says_which() -> None:
    old = configuration.load(None, {})
    changed = configuration.load(None, {"AGENTD_ADAPT_RANK": "3", "AGENTD_SERVE_SLOTS": "9", "AGENTD_SERVE_QUEUE": "5"})
    change = compare(old, changed)
    assert (change.changed, change.fixed) == (["serve.queue", "adapt.rank"], ["serve.slots"])
    assert (change.config.adapt.rank, change.config.serve.slots, change.config.serve.queue) == (3, 4, 5)
    assert compare(old, old).summary == "changed: nothing"
    assert {name for name, _, _ in configuration.reference()} >= FIXED


def test_sighup_reads_the_configuration_again(daemon: DaemonProcess, model: Path) -> None:
    settings = {
        "serve": {"max_tokens": 3, "slots": 1, "aliases": ["gpt"]},
        "tasks": {"mood": {"choices": ["good", "bad"]}},
    }
    daemon.configure(model, settings)
    os.kill(daemon.pid, signal.SIGHUP)
    (event,) = eventually(lambda: events(daemon, "reloaded"))
    assert sorted(event["data"]["changed"]) == ["serve.aliases", "serve.max_tokens", "tasks"]
    assert event["data"]["fixed"] == ["serve.slots"]
    assert "gpt" in {model["id"] for model in daemon.get("/v1/models").json["data"]}
    assert daemon.ask(model="gpt").json["model"] == "gpt"
    assert daemon.ask(max_tokens=None).json["usage"]["completion_tokens"] <= 3
    assert "mood" in {task["name"] for task in daemon.get("/admin/tasks", admin=True).json["tasks"]}

    daemon.config.write_text("serve: {slots: many}")
    os.kill(daemon.pid, signal.SIGHUP)
    (failed,) = eventually(lambda: events(daemon, "reload failed"))
    assert "serve.slots" in failed["message"]
    assert daemon.ask(max_tokens=None).json["usage"]["completion_tokens"] <= 3
    assert daemon.status()["state"] == "serving"


def test_a_sighup_that_comes_while_it_starts_is_not_lost(model: Path) -> None:
    with DaemonProcess(model) as daemon:
        daemon.start(wait=False)

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return bool(daemon.status())
            return False

        eventually(answers, 30)
        daemon.configure(model, {"serve": {"aliases": ["gpt"]}})
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_until_ready()
        (event,) = eventually(lambda: events(daemon, "reloaded"))
        assert event["data"]["changed"] == ["serve.aliases"]


def command(daemon: DaemonProcess, *arguments: str) -> "subprocess.CompletedProcess[str]":
    module = ["agentd.ctl.app", "--socket", str(daemon.admin)] if arguments[0] == "backup" else ["agentd"]
    config = [] if arguments[0] == "backup" else ["--config", str(daemon.config)]
    return subprocess.run(
        [sys.executable, "-m", *module, *config, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_backup_made_while_running_can_be_put_back(daemon: DaemonProcess) -> None:
    inference = daemon.ask(max_tokens=1).json["id"]
    stopping, feedback_ids = threading.Event(), []

    def give() -> None:
        while not stopping.is_set():
            body = {"inference_id": inference, "kind": "comment", "value": "hm"}
            feedback_ids.append(daemon.post("/v1/feedback", body).json["id"])

    thread = threading.Thread(target=give)
    thread.start()
    eventually(lambda: len(feedback_ids) > 20)
    archive = daemon.directory / "backup.tar"
    known = len(feedback_ids)
    backup = command(daemon, "backup", str(archive))
    stopping.set()
    thread.join()
    assert backup.returncode == 0, backup.stderr
    assert archive.stat().st_mode & 0o777 == 0o600
    assert command(daemon, "backup", str(archive)).returncode == 2, "it overwrites nothing"
    assert [path.name for path in daemon.state.glob(".backup*")] == []

    refused = command(daemon, "restore", str(archive))
    assert (refused.returncode, "already uses the state directory" in refused.stderr) == (75, True)
    daemon.stop()
    refused = command(daemon, "restore", str(archive))
    assert (refused.returncode, "--replace" in refused.stderr) == (65, True)
    restored = command(daemon, "restore", str(archive), "--replace")
    assert restored.returncode == 0, restored.stderr
    daemon.start()
    stored = [row["id"] for row in daemon.get("/admin/feedback?limit=1000", admin=True).json["feedback"]]
    assert len(stored) >= known
    assert set(stored) <= set(feedback_ids)
    assert len(list(daemon.state.glob("replaced-*/agentd.db"))) == 1


def test_what_clients_say_stays_out_of_the_log(model: Path) -> None:
    secret, header = "the-attic-key-is-under-the-mat", "Bearer sk-very-secret"
    with DaemonProcess(model, environment={"AGENTD_LOG": "DEBUG"}) as daemon:
        daemon.start()
        request = {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}
        for body in (
            request,
            {**request, "tools": [secret]},
            {**request, "grammar": secret},
            secret,
            {"messages": secret},
        ):
            daemon.post("/v1/chat/completions", body, headers={"Authorization": header})
        id = daemon.ask(secret).json["id"]
        for value in (secret, "", {secret: 1}):
            daemon.post("/v1/feedback", {"inference_id": id, "kind": "comment", "value": value, "tags": {"a": secret}})
        daemon.post("/v1/examples", f'{{"task": "t", "prompt": "{secret}", "label": ""}}'.encode())
        daemon.get(f"/v1/models/{secret}?key={secret}")
        daemon.stop()
        assert "serving" in daemon.log
        assert secret not in daemon.log
        assert "very-secret" not in daemon.log


def test_no_other_user_can_read_the_state_and_requests_have_an_author(daemon: DaemonProcess) -> None:
    id = daemon.ask(max_tokens=1).json["id"]
    daemon.post("/v1/feedback", {"inference_id": id, "kind": "label", "value": "yes", "task": "reviews"})
    number = daemon.post("/admin/adapt", {}, admin=True).json["pass"]
    eventually(lambda: daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]["finished_at"], 60)
    assert {path.stat().st_mode & 0o077 for path in [daemon.state, *daemon.state.rglob("*")]} == {0}
    me = f"uid:{os.getuid()}"
    assert daemon.inference(id)["author"] == me
    (row,) = daemon.get(f"/admin/feedback?author={me}", admin=True).json["feedback"]
    assert (row["author"], row["state"]) == (me, "accepted")
    assert daemon.get("/admin/feedback?author=uid:99999", admin=True).json["total"] == 0


def test_of_passes_asked_for_at_the_same_time_one_starts(daemon: DaemonProcess) -> None:
    """A second one would take the first one's session away, and the first one's row stand there as running."""
    lines = [{"task": "reviews", "text": f"Film number {n}.", "label": ("yes", "no")[n % 2]} for n in range(60)]
    assert daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode()).status == 200

    def together(path: str) -> list[int]:
        statuses: list[int] = []
        barrier = threading.Barrier(6)

        def ask() -> None:
            barrier.wait()
            statuses.append(daemon.post(path, {}, admin=True).status)

        askers = [threading.Thread(target=ask) for _ in range(6)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        return sorted(statuses)

    for _ in range(4):
        assert together("/admin/adapt") == [202, *[409] * 5]
        assert set(together("/admin/cancel")) <= {200, 409}
        passes = daemon.get("/admin/passes", admin=True).json["passes"]
        assert all(row["finished_at"] for row in passes)


def test_a_flood_is_kept_apart_and_then_refused(model: Path) -> None:
    with DaemonProcess(model, {"feedback": {"limit": 3, "max_quarantined": 2}}) as daemon:
        daemon.start()

        def give(n: int, **more: Any) -> Any:
            id = daemon.ask(f"question {n}", max_tokens=1, metadata={"task": "reviews"}).json["id"]
            return daemon.post("/v1/feedback", {"inference_id": id, "kind": "label", "value": "yes", **more})

        answers = [give(n) for n in range(6)]
        assert [answer.status for answer in answers] == [201] * 5 + [429]
        assert [answer.json.get("state") for answer in answers[:5]] == [None] * 3 + ["quarantined"] * 2
        assert "feedback.limit" in answers[3].json["reason"]
        assert answers[5].error["code"] == "too_much_feedback"
        assert give(7, source="program").status == 201, "another source has its own"
        assert len(daemon.get("/admin/examples", admin=True).json["examples"]) == 4
        held = daemon.get("/admin/feedback?state=quarantined", admin=True).json["feedback"]
        released = daemon.post("/admin/release", {"feedback": [held[0]["id"]]}, admin=True)
        assert released.json == {"released": [held[0]["id"]]}
        assert len(daemon.get("/admin/examples", admin=True).json["examples"]) == 5
        gone = daemon.post("/admin/forget", {"feedback": [held[1]["id"]]}, admin=True).json
        assert (gone["feedback"], gone["inferences"], gone["revisions"]) == (1, 1, [])
        assert daemon.post("/admin/forget", {"feedback": ["nothing"]}, admin=True).status == 404
        assert daemon.post("/admin/forget", {}, admin=True).status == 400


def commit_by_hand(daemon: DaemonProcess, model: Path) -> None:
    """Revision 1, which is the base's weights, serves from the next start on."""
    store = Store(daemon.state / "agentd.db")
    store.do(revisions.add, Revision(1, 0, None, "2026-01-01", "committed", None, "mezo", 0, None, {}))
    store.do(revisions.activate, 1, "made for a test")
    store.close()
    directory = daemon.state / "revisions" / "1"
    directory.mkdir(mode=0o700)
    (directory / "manifest.json").write_text(json.dumps({"files": {}, "base_sha256": daemon_sha256(model)}))


def test_starts_that_came_to_nothing_do_not_cost_a_revision_that_answers(model: Path) -> None:
    """Power cuts, or kills: nothing says that it is the revision's fault."""
    with DaemonProcess(model) as daemon:
        daemon.start()
        daemon.stop()
        commit_by_hand(daemon, model)
        starts = StartCounter(daemon.state / "starts")
        for number in range(LIMIT):
            assert starts.begin() == number + 1
        daemon.start()  # canary prompts are asked first
        status = daemon.status()
        assert (status["state"], status["revision"], status["problem"]) == ("serving", 1, None)
        assert daemon.ask(max_tokens=1).json["agentd"]["revision"] == 1
        eventually(lambda: not (daemon.state / "starts").exists(), 5)


def test_the_watchdog_is_fed_only_while_the_engine_answers(model: Path) -> None:
    with DaemonProcess(model) as daemon, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = daemon.directory / "notify"
        manager.bind(str(address))
        manager.settimeout(10)
        daemon.environment |= {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "1000000"}
        daemon.start()

        def expect(text: bytes, times: int = 1) -> None:
            while times:
                times -= text in manager.recv(4096)

        expect(b"WATCHDOG=1")
        (engine,) = psutil.Process(daemon.pid).children()
        engine.suspend()
        manager.settimeout(2.5)
        try:
            with pytest.raises(TimeoutError):
                expect(b"WATCHDOG=1", times=4)  # some were on their way
        finally:
            engine.resume()
        manager.settimeout(10)
        expect(b"WATCHDOG=1")


def daemon_sha256(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()


def test_lines_for_the_journal_carry_their_level() -> None:
    formatter = JournalFormatter("%(message)s")
    record = logging.LogRecord("x", logging.ERROR, "", 0, "two\nlines", None, None)
    assert formatter.format(record) == "<3>two\n<3>lines"
    record.levelno = logging.INFO
    assert formatter.format(record).startswith("<6>")
    code = "from agentd import logs; import logging; logs.configure(); logging.getLogger('a').warning('b')"
    read, write = os.pipe()
    about = os.fstat(write)
    environment = {**os.environ, "JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"}
    subprocess.run([sys.executable, "-c", code], stderr=write, env=environment, check=True)
    subprocess.run([sys.executable, "-c", code], stderr=write, env={**environment, "JOURNAL_STREAM": "1:2"}, check=True)
    os.close(write)
    with os.fdopen(read) as log:
        assert log.read().splitlines() == ["<4>a: b", "WARNING a: b"]


def test_what_is_forgotten_is_learned_again_without(model: Path) -> None:
    gate = {"alpha": 0.4, "min_holdout": 3, "max_drift": 100, "max_skill_loss": 1}
    with DaemonProcess(model, {"adapt": {"gate": gate, "trial": {"duration": 0}}}) as daemon:
        daemon.start()
        lines = [{"task": "reviews", "text": f"text {n}", "label": "no" if n % 8 == 7 else "yes"} for n in range(60)]
        daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode())
        inference_ids = [
            daemon.ask(f"question {n}", max_tokens=1, metadata={"task": "reviews"}).json["id"] for n in range(6)
        ]
        opinions = [
            daemon.post(
                "/v1/feedback", {"inference_id": id, "kind": "label", "value": "yes", "tags": {"who": "me"}}
            ).json
            for id in inference_ids
        ]

        def adapted(number: int) -> dict[str, Any]:
            def look() -> dict[str, Any] | None:
                row: dict[str, Any] = daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]
                return row if row["finished_at"] else None

            row = eventually(look, 120)
            assert row is not None
            return row

        first = adapted(daemon.post("/admin/adapt", {"method": "mezo", "zo_steps": 4}, admin=True).json["pass"])
        assert (first["state"], first["revision"]) == ("committed", 1), first["reason"]
        looked = daemon.post("/admin/forget", {"tags": {"who": "me"}, "dry_run": True}, admin=True).json
        assert (looked["feedback"], looked["revisions"], looked["passes"]) == (6, [1], [1])
        assert daemon.get("/admin/feedback", admin=True).json["total"] == 6
        folder = daemon.state / "passes" / "1"
        assert "question 0" in (folder / "examples.jsonl").read_text()

        without = {"feedback": [row["id"] for row in opinions]}
        rebuilt = daemon.post("/admin/rebuild", {"without": without, "method": "mezo", "zo_steps": 4}, admin=True)
        assert rebuilt.status == 202, rebuilt.body
        assert rebuilt.json["given_up"] == [1]
        assert rebuilt.json["forgotten"]["revisions"] == [1]
        second = adapted(rebuilt.json["pass"])
        assert (second["parent_revision"], second["n_train"] + second["n_holdout"]) == (0, 60)
        assert not folder.exists()
        assert not (daemon.state / "revisions" / "1").exists()
        rows = {row["id"]: row for row in daemon.get("/admin/revisions", admin=True).json["revisions"]}
        assert (rows[1]["state"], rows[1]["forgotten"] > 0) == ("discarded", True)
        assert daemon.post("/admin/rollback", {"revision": 1}, admin=True).status == 409
        for file in daemon.state.rglob("*"):
            assert not file.is_file() or b"question 0" not in file.read_bytes(), file
