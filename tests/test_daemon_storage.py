"""Feedback that was acknowledged is kept, whatever happens to the daemon or the disk."""

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
from daemon_process import DaemonProcess, eventually

# SQLite itself takes the place of a full disk: the database may not grow beyond so many pages. It says "database or
# disk is full" then, as it does for ENOSPC.
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
_MOUNTED = 'mkdir -p "$0" && mount -t tmpfs -o size=1m,mode=700 tmpfs "$0" && exec "$@"'


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


def limited_pages(daemon: DaemonProcess) -> list[str]:
    return [sys.executable, "-c", _LIMITED]


def small_disk(daemon: DaemonProcess) -> list[str]:
    if not _may_mount():
        pytest.skip("may not mount a file system here")
    return ["unshare", "-Urm", "sh", "-c", _MOUNTED, str(daemon.state)]


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

        told = [daemon.ask("Hi", max_tokens=1, user="y" * 30_000).json for _ in range(4)]
        assert all(answer["choices"][0]["message"]["content"] for answer in told)
        unrecorded = [answer for answer in told if answer["agentd"].get("recorded") is False]
        assert unrecorded, "the disk is full, and everything is recorded?"
        about_it = daemon.post("/v1/feedback", {"inference_id": unrecorded[0]["id"], "kind": "boolean", "value": True})
        assert about_it.status == 404
        kept = daemon.get("/admin/feedback?limit=1000", admin=True).json
        assert [row["id"] for row in reversed(kept["feedback"])] == acknowledged
        assert daemon.status()["state"] == "serving"


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
        kept: dict[str, str] = {}
        while True:
            page = daemon.get(f"/admin/feedback?limit=1000&offset={len(kept)}", admin=True).json["feedback"]
            if not page:
                break
            kept |= {row["value"]: row["id"] for row in page}
        assert acknowledged.items() <= kept.items()
        assert len(kept) <= len(acknowledged) + 4  # one each on its way
        key, id = next(iter(acknowledged.items()))
        again = {"inference_id": inference, "kind": "comment", "value": key, "idempotency_key": key}
        answer = daemon.post("/v1/feedback", again)
        assert (answer.status, answer.json["id"]) == (200, id)
