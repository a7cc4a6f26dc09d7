"""What goes wrong on boards that are left alone: files that are replaced, restarts, slow starts."""

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tools import tiny_model
from tools.daemon import DaemonProcess, eventually


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tiny_model.write(tmp_path / "model.gguf")) as daemon:
        yield daemon


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
