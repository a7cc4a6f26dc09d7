"""Feedback that was acknowledged is kept, whatever happens to the daemon or the disk."""

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.daemon import DaemonProcess, eventually

# SQLite itself takes the place of a full disk: the database may not grow beyond a set number of pages. It says
# "database or disk is full" then, as it does for ENOSPC.
_LIMITED = """
import runpy, sqlite3, sys
connect = sqlite3.connect
def limited(*arguments, **options):
    connection = connect(*arguments, **options)
    connection.execute("PRAGMA max_page_count = 200")
    return connection
sqlite3.connect = limited
sys.argv = ["agentd", *sys.argv[4:]]
runpy.run_module("agentd", run_name="__main__", alter_sys=True)
"""
_MOUNTED = 'mkdir -p "$0" && mount -t tmpfs -o size={size},mode=700 tmpfs "$0" && exec "$@"'


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


def limited_pages(daemon: DaemonProcess) -> list[str]:
    return [sys.executable, "-c", _LIMITED]


def small_disk(daemon: DaemonProcess, size: str = "2m") -> list[str]:
    if not _may_mount():
        pytest.skip("may not mount a file system here")
    return ["unshare", "-Urm", "sh", "-c", _MOUNTED.format(size=size), str(daemon.state)]


@pytest.mark.parametrize("wrap", [limited_pages, small_disk])
def test_a_full_disk(model_path: Path, wrap: Callable[[DaemonProcess], list[str]]) -> None:
    with DaemonProcess(model_path) as daemon:
        daemon.wrapper = wrap(daemon)
        daemon.start()
        inference = daemon.ask(max_tokens=1).json["id"]
        acknowledged: list[str] = []
        body: dict[str, Any] = {"inference_id": inference, "kind": "comment", "value": "x" * 30_000}
        for _ in range(100):
            answer = daemon.post("/v1/feedback", body)
            if answer.status != 201:
                break
            acknowledged.append(answer.json["id"])
        assert (answer.status, answer.error["code"]) == (507, "storage_full"), daemon.log
        assert answer.error["type"] == "storage_error"
        assert "free some space" in answer.error["message"]
        assert acknowledged

        lines = b"\n".join(b'{"task": "t", "prompt": "%d%s", "label": "x"}' % (i, b"y" * 5000) for i in range(200))
        imported = daemon.post("/v1/examples", lines)
        assert (imported.status, imported.error["code"]) == (507, "storage_full")
        assert daemon.get("/admin/examples", admin=True).json["counts"] == {}
        assert all(task["name"] != "t" for task in daemon.get("/admin/tasks", admin=True).json["tasks"])

        answers = [daemon.ask("Hi", max_tokens=1, user="y" * 30_000).json for _ in range(4)]
        assert all(answer["choices"][0]["message"]["content"] for answer in answers)
        unrecorded = [answer for answer in answers if answer["agentd"].get("recorded") is False]
        assert unrecorded, "the disk is full, and everything is recorded?"
        about_it = daemon.post("/v1/feedback", {"inference_id": unrecorded[0]["id"], "kind": "boolean", "value": True})
        assert about_it.status == 404
        stored = daemon.get("/admin/feedback?limit=1000", admin=True).json
        assert [row["id"] for row in reversed(stored["feedback"])] == acknowledged
        assert daemon.status()["state"] == "serving"


def _asked(daemon: DaemonProcess, times: int, size: int = 20_000) -> list[dict[str, Any]]:
    return [daemon.ask("Hi", max_tokens=1, user="y" * size).json for _ in range(times)]


@pytest.mark.parametrize("wrap", [limited_pages, small_disk])
def test_answers_that_fill_the_disk_leave_room_for_feedback_and_for_deleting(
    wrap: Callable[[DaemonProcess], list[str]],
) -> None:
    with DaemonProcess() as daemon:
        daemon.wrapper = wrap(daemon)
        daemon.start()
        judged = _asked(daemon, 1)[0]["id"]
        about = {"inference_id": judged, "kind": "comment", "value": "of the first answer"}
        assert daemon.post("/v1/feedback", about).status == 201
        answers = _asked(daemon, 120)
        assert all("recorded" not in answer["agentd"] for answer in answers)
        status = daemon.status()
        assert status["state"] == "serving"
        assert "oldest answers without feedback were dropped" in status["problem"]
        eventually(lambda: "disk full" in str(daemon.get("/admin/events", admin=True).json), timeout=20)
        # The newest answers are there, and so is the one that somebody said something about.
        daemon.inference(judged)
        for answer in [*answers[-5:], *_asked(daemon, 5)]:
            body = {"inference_id": answer["id"], "kind": "label", "value": "fine", "task": "t"}
            assert daemon.post("/v1/feedback", body).status == 201, daemon.log[-2000:]
        assert daemon.get(f"/admin/inferences/{answers[0]['id']}", admin=True).status == 404
        forgotten = daemon.post("/admin/forget", {"inferences": [judged]}, admin=True)
        assert (forgotten.status, forgotten.json["feedback"]) == (200, 1)
        if wrap is limited_pages:  # the small disk goes with the process
            assert daemon.stop() == 0
            daemon.start()
        assert daemon.get("/admin/feedback", admin=True).json["total"] == 10


def _lines(number: int, size: int) -> bytes:
    return b"\n".join(b'{"task": "t", "prompt": "%d%s", "label": "x"}' % (i, b"y" * size) for i in range(number))


def test_an_import_that_is_larger_than_what_is_kept_takes_the_place_of_answers_or_changes_nothing() -> None:
    with DaemonProcess() as daemon:
        daemon.wrapper = small_disk(daemon, "24m")
        daemon.start()
        _asked(daemon, 50, 500_000)
        assert "is full" in daemon.status()["problem"]

        def kept() -> int:
            return len(daemon.get("/admin/inferences?limit=1000", admin=True).json["inferences"])

        answers = kept()
        refused = daemon.post("/v1/examples", _lines(1000, 6000))
        assert (refused.status, refused.error["code"]) == (507, "storage_full")
        assert "take less at a time" in refused.error["message"]
        assert kept() == answers
        assert daemon.get("/admin/examples", admin=True).json["counts"] == {}
        assert all(task["name"] != "t" for task in daemon.get("/admin/tasks", admin=True).json["tasks"])

        assert daemon.post("/v1/examples", _lines(350, 6000)).json["added"] == 350, daemon.log[-2000:]
        assert 10 <= kept() < answers
        author = daemon.get("/admin/examples?limit=1", admin=True).json["examples"][0]["author"]
        gone = daemon.post("/admin/forget", {"authors": [author]}, admin=True)
        assert (gone.status, gone.json["examples"]) == (200, 350), daemon.log[-2000:]


def test_a_disk_that_others_fill_is_noticed_and_recovers_by_itself() -> None:
    with DaemonProcess() as daemon:
        daemon.wrapper = small_disk(daemon)
        daemon.start()
        inference = daemon.ask(max_tokens=1).json["id"]
        inside = Path(f"/proc/{daemon.pid}/root") / daemon.state.relative_to("/")
        ballast = inside / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 1024):
                pass
        eventually(lambda: daemon.status()["problem"], timeout=20)
        for number in range(5):  # nothing is left on the disk but what was kept for this
            body = {"inference_id": inference, "kind": "comment", "value": f"{number}"}
            assert daemon.post("/v1/feedback", body).status == 201
        assert daemon.post("/admin/forget", {"inferences": [inference]}, admin=True).status == 200
        ballast.unlink()
        eventually(lambda: daemon.status()["problem"] is None, timeout=30)
        kinds = [event["kind"] for event in daemon.get("/admin/events", admin=True).json["events"]]
        assert kinds.index("disk full") < kinds.index("disk has room")
        assert "recorded" not in daemon.ask(max_tokens=1).json["agentd"]


def test_kill_9_in_a_burst_of_feedback_loses_nothing_that_was_acknowledged(model_path: Path) -> None:
    with DaemonProcess(model_path).start() as daemon:
        inference = daemon.ask(max_tokens=1).json["id"]
        acknowledged: dict[str, str] = {}

        def burst(writer: int) -> None:
            for i in range(10_000):
                key = f"{writer}-{i}"
                body = {"inference_id": inference, "kind": "comment", "value": key, "idempotency_key": key}
                try:
                    answer = daemon.post("/v1/feedback", body)
                except (OSError, http.client.HTTPException):  # the daemon is gone
                    return
                assert answer.status == 201
                acknowledged[key] = answer.json["id"]

        writers = [threading.Thread(target=burst, args=(writer,)) for writer in range(4)]
        for writer in writers:
            writer.start()
        eventually(lambda: len(acknowledged) > 100, timeout=60)
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait()
        for writer in writers:
            writer.join(30)
        assert len(acknowledged) > 100

        daemon.start()
        stored: dict[str, str] = {}
        while True:
            page = daemon.get(f"/admin/feedback?limit=1000&offset={len(stored)}", admin=True).json["feedback"]
            if not page:
                break
            stored |= {row["value"]: row["id"] for row in page}
        assert acknowledged.items() <= stored.items()
        assert len(stored) <= len(acknowledged) + 4  # one each on its way
        key, id = next(iter(acknowledged.items()))
        again = {"inference_id": inference, "kind": "comment", "value": key, "idempotency_key": key}
        answer = daemon.post("/v1/feedback", again)
        assert (answer.status, answer.json["id"]) == (200, id)
