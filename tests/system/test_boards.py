"""What goes wrong on boards that are left alone: files that are replaced, restarts, slow starts."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentd.host.file_digest import stamp
from agentd.host.sha256 import resumable
from tools import tiny_model
from tools.daemon import DaemonProcess, eventually


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tiny_model.write(tmp_path / "model.gguf")) as daemon:
        yield daemon


def test_a_request_may_use_what_the_model_was_trained_for(daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon.configure(tmp_path / "model.gguf", {"model": {"context": "auto"}})
    daemon.start()
    assert daemon.status()["model"]["n_ctx"] == tiny_model.CONTEXT
    os.kill(daemon.pid, signal.SIGHUP)  # and it stays so

    def reloaded() -> list[dict[str, Any]]:
        shown = daemon.get("/admin/events", admin=True).json["events"]
        return [event for event in shown if event["kind"] == "reloaded"]

    assert eventually(reloaded)[0]["data"] == {"changed": [], "fixed": []}
    assert daemon.get("/admin/budget", admin=True).json["model"]["context"] == tiny_model.CONTEXT


def test_a_pause_outlasts_restarts(daemon: DaemonProcess) -> None:
    daemon.start()
    for path, paused in (("pause", True), ("pause", True), ("resume", False)):
        assert daemon.post(f"/admin/{path}", {}, admin=True).json == {"paused": paused}
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.status()["next_trigger"]["paused"] is paused
    kinds = [event["kind"] for event in daemon.get("/admin/events", admin=True).json["events"]]
    assert [kind for kind in kinds if kind.startswith("adaptation")] == ["adaptation paused", "adaptation resumed"]


def test_a_model_that_is_replaced_is_not_served_as_the_old_one(daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon.start()
    model, original = tmp_path / "model.gguf", tmp_path / "kept.gguf"
    before = daemon.status()
    model.rename(original)
    tiny_model.write(model, seed=1)
    eventually(lambda: "model" in daemon.status()["held"], 20)  # no pass learns for it
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    assert daemon.post("/v1/chat/completions", chat).status == 200  # the engine has the old one still
    psutil.Process(before["pid"]).children()[0].kill()

    def problem() -> bool:
        return "no longer the file" in (daemon.status()["problem"] or "")

    eventually(problem, 20)
    original.replace(model)
    eventually(lambda: daemon.status()["state"] == "serving", 40)
    assert daemon.post("/v1/chat/completions", chat).status == 200
    assert daemon.status()["model"]["sha256"] == before["model"]["sha256"]


def test_a_model_that_is_written_to_is_not_served(daemon: DaemonProcess, tmp_path: Path) -> None:
    """As `cp other.gguf model.gguf` does it: the engine's mapping would show the other one."""
    daemon.start()
    model = tmp_path / "model.gguf"
    original = model.read_bytes()
    before = daemon.status()
    other = tiny_model.write(tmp_path / "other.gguf", seed=1).read_bytes()
    assert len(other) == len(original)
    with model.open("r+b") as file:
        file.write(other)
    os.utime(model, ns=(0, 0))

    def refused() -> bool:
        status = daemon.status()
        return status["state"] != "serving" and "no longer the file" in (status["problem"] or "")

    eventually(refused, 20)
    with model.open("r+b") as file:
        file.write(original)
    eventually(lambda: daemon.status()["state"] == "serving", 40)
    assert daemon.status()["model"]["sha256"] == before["model"]["sha256"]
    daemon.stop()
    status = model.stat()
    with model.open("r+b") as file:
        file.write(other)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    daemon.start()
    assert daemon.status()["model"]["sha256"] == hashlib.sha256(other).hexdigest()


def test_a_hash_that_was_interrupted_goes_on_at_the_next_start(daemon: DaemonProcess, tmp_path: Path) -> None:
    if not resumable():
        pytest.skip("this Python has libcrypto built in")
    model = tmp_path / "model.gguf"
    os.truncate(model, 1 << 30)  # what is behind the tensors is part of the file
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(60)
        daemon.environment["NOTIFY_SOCKET"] = str(address)
        daemon.start(wait=False)

        def shares(until: str) -> list[int]:
            said: list[str] = []
            while not any(until in message for message in said):
                said.append(manager.recv(4096).decode())
            return [int(share) for share in re.findall(r"reading the model, (\d+)%", "\n".join(said))]

        assert shares("reading the model, 50%")
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait()
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                manager.recv(4096)
        manager.settimeout(60)
        daemon.start(wait=False)
        assert min(shares("READY=1")) >= 50
    digest = hashlib.sha256()
    with model.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    assert daemon.status()["model"]["sha256"] == digest.hexdigest()


def test_what_was_taken_on_trust_is_read_while_it_serves(daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon.start()
    daemon.stop()
    model = tmp_path / "model.gguf"
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    with model.open("r+b") as file:  # a disk that holds something else than it did, and says the same of it
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    db = sqlite3.connect(daemon.state / "agentd.db")
    db.execute("UPDATE model_files SET stamp = ?", [json.dumps(list(stamp(model)))])
    db.commit()
    db.close()
    daemon.start()
    eventually(lambda: "no longer the file" in (daemon.status()["problem"] or ""), 20)
    daemon.stop()
    daemon.start()
    assert daemon.status()["model"]["sha256"] != sha256


def test_a_slow_start_asks_for_more_time(daemon: DaemonProcess, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(30)
        daemon.environment["NOTIFY_SOCKET"] = str(address)
        daemon.start(wait=False)
        messages: list[str] = []
        while not any(message.startswith("READY=1") for message in messages):
            messages.append(manager.recv(4096).decode())
    assert "EXTEND_TIMEOUT_USEC=60000000" in messages
    assert any("reading the model, 100%" in message for message in messages)
