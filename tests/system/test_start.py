"""Starting and stopping: what is wrong is said at once and nothing is harmed; what was promised is kept."""

import os
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.daemon import shared
from tools.daemon import Answer, DaemonProcess, eventually, lives, streaming

# sysexits.h
EX_DATAERR, EX_NOINPUT, EX_UNAVAILABLE, EX_IOERR, EX_TEMPFAIL, EX_CONFIG = 65, 66, 69, 74, 75, 78

# The daemon's command line, with the signal sent from within at the first moment in which anyone could send it.
_TERMINATED_ONCE_BOUND = """
import os, signal, sys
from agentd import daemon
from agentd.__main__ import main

bind = daemon.unix_socket

def bind_and_stop(path, mode):
    listener = bind(path, mode)
    os.kill(os.getpid(), signal.SIGTERM)
    return listener

daemon.unix_socket = bind_and_stop
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture
def unstarted(model_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(model_path) as daemon:
        yield daemon


def refuses(daemon: DaemonProcess, *expected: str, status: int) -> None:
    """The start fails with the exit status, one clear message and no traceback, and leaves no sockets."""
    code, log = daemon.run_to_end()
    assert code == status, log
    for text in expected:
        assert text in log
    assert "Traceback" not in log
    assert not daemon.api.exists()
    assert not daemon.admin.exists()


def test_a_model_that_is_missing(unstarted: DaemonProcess) -> None:
    unstarted.configure("/nonexistent/model.gguf", {})
    refuses(unstarted, "cannot use the model /nonexistent/model.gguf: there is no such file", status=EX_NOINPUT)


def test_a_model_that_is_no_gguf(unstarted: DaemonProcess) -> None:
    model = unstarted.directory / "model.gguf"
    model.write_bytes(b"not a model" * 1000)
    unstarted.configure(model, {})
    refuses(unstarted, "cannot use the model", str(model), status=EX_NOINPUT)


def test_a_model_that_is_cut_short(unstarted: DaemonProcess, model_path: Path) -> None:
    model = unstarted.directory / "model.gguf"
    with model_path.open("rb") as source, model.open("wb") as sink:
        sink.write(source.read(10_000_000))
    unstarted.configure(model, {})
    refuses(unstarted, "cannot use the model", str(model), status=EX_NOINPUT)


def test_a_model_with_a_damaged_header(unstarted: DaemonProcess, model_path: Path) -> None:
    model = unstarted.directory / "model.gguf"
    with model_path.open("rb") as source:
        data = bytearray(source.read(100_000))
    data[8:16] = b"\xff" * 8  # the number of tensors
    model.write_bytes(data)
    unstarted.configure(model, {})
    refuses(unstarted, "cannot use the model", str(model), status=EX_NOINPUT)


def test_a_model_that_only_the_engine_finds_unusable(unstarted: DaemonProcess, model_path: Path) -> None:
    model = unstarted.directory / "model.gguf"
    data = model_path.read_bytes()
    assert data.count(b"blk.5.attn_q.weight") == 1
    model.write_bytes(data.replace(b"blk.5.attn_q.weight", b"blk.5.attn_r.weight"))
    unstarted.configure(model, {})
    refuses(unstarted, "cannot use the model", str(model), "blk.5.attn_q.weight", status=EX_NOINPUT)
    assert (unstarted.state / "agentd.db").exists()  # the state was in order


def test_a_model_of_the_hub_without_a_network(unstarted: DaemonProcess) -> None:
    unstarted.configure("hf:owner/repository/model.gguf", {})
    cache = str(unstarted.directory / "hub")
    unstarted.environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": cache}
    refuses(
        unstarted,
        "cannot use the model hf:owner/repository/model.gguf",
        "HF_HUB_OFFLINE",
        "model.path",
        status=EX_NOINPUT,
    )


def test_a_mistake_in_the_configuration_is_not_worth_a_restart(unstarted: DaemonProcess) -> None:
    unstarted.config.write_text("serve: {slots: 0, sockt: x}\nadapt: {method: magic}\n")
    refuses(unstarted, "3 problem(s)", "serve.slots", "serve.sockt: unknown key", "adapt.method", status=EX_CONFIG)
    service = Path(__file__).parents[2] / "systemd" / "agentd.service"
    assert f"RestartPreventExitStatus={EX_DATAERR} {EX_NOINPUT} {EX_CONFIG}" in service.read_text()


def test_a_second_daemon_on_the_same_state_leaves_the_first_alone(model_path: Path) -> None:
    first = shared(model_path)
    with DaemonProcess(model_path, {"state": {"dir": str(first.state)}}) as second:
        refuses(
            second,
            f"another agentd (pid {first.pid}) already uses the state directory {first.state}",
            status=EX_TEMPFAIL,
        )
    same = {"serve": {"socket": str(first.api), "admin_socket": str(first.admin)}, "state": {"dir": str(first.state)}}
    with DaemonProcess(model_path, same) as twin:
        assert twin.run_to_end()[0] == EX_TEMPFAIL
    assert first.ask().status == 200
    assert first.status()["pid"] == first.pid


def test_a_second_daemon_on_the_same_sockets_leaves_the_first_alone(model_path: Path) -> None:
    first = shared(model_path)
    for settings in (
        {"serve": {"socket": str(first.api)}},
        {"serve": {"admin_socket": str(first.admin)}},
    ):
        with DaemonProcess(model_path, settings) as second:
            refuses(second, "cannot listen on", "another server already listens there", status=EX_UNAVAILABLE)
    assert first.get("/health").status == 200
    assert first.get("/admin/status", admin=True).status == 200


def test_a_socket_path_that_is_a_file(unstarted: DaemonProcess) -> None:
    unstarted.admin.write_text("mine")
    code, log = unstarted.run_to_end()
    assert (code, "a file that is no socket is there" in log, unstarted.api.exists()) == (EX_UNAVAILABLE, True, False)
    assert unstarted.admin.read_text() == "mine"


def test_a_state_directory_that_cannot_be_used(unstarted: DaemonProcess) -> None:
    unstarted.state.touch()
    refuses(unstarted, str(unstarted.state), "File exists", status=EX_IOERR)


def test_a_database_of_a_newer_version_is_not_touched(unstarted: DaemonProcess) -> None:
    unstarted.start()
    unstarted.stop()
    path = unstarted.state / "agentd.db"
    db = sqlite3.connect(path)
    statement = "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('agentd', ?, '')"
    db.execute(statement, ["m999_from_the_future"])
    db.commit()
    before = path.read_bytes()
    refuses(unstarted, "newer agentd", "m999_from_the_future", "not touched", status=EX_DATAERR)
    assert path.read_bytes() == before
    db.execute("DELETE FROM _sqlite_migrations")
    db.execute(statement, ["m001_initial"])
    db.commit()
    db.close()
    before = path.read_bytes()
    refuses(unstarted, "before the first release", "m001_initial", "Move the state directory", status=EX_DATAERR)
    assert path.read_bytes() == before


def test_a_database_that_is_damaged(unstarted: DaemonProcess) -> None:
    unstarted.state.mkdir(mode=0o700)
    path = unstarted.state / "agentd.db"
    path.write_bytes(b"SQLite format 4\0" + b"\xff" * 8176)
    before = path.read_bytes()
    refuses(unstarted, str(path), "is damaged", "put a backup in its place", status=EX_IOERR)
    assert path.read_bytes() == before


def engines(daemon: DaemonProcess) -> list[psutil.Process]:
    children = psutil.Process(daemon.pid).children(recursive=True)
    assert children
    return children


def test_after_kill_9_the_engine_is_gone_and_the_next_start_replaces_the_sockets(unstarted: DaemonProcess) -> None:
    unstarted.start()
    answered = unstarted.ask().json
    children = engines(unstarted)
    os.kill(unstarted.pid, signal.SIGKILL)
    unstarted.wait()
    eventually(lambda: not any(map(lives, children)), 5)
    assert unstarted.api.exists()
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(unstarted.api))
    unstarted.start()
    assert unstarted.inference(answered["id"])["output"] == answered["choices"][0]["message"]["content"]
    assert unstarted.ask().json["choices"] == answered["choices"]


def test_an_engine_that_is_killed_comes_back_unnoticed_by_who_had_not_begun(unstarted: DaemonProcess) -> None:
    unstarted.start()
    answer = unstarted.ask().json["choices"]
    for child in engines(unstarted):
        child.kill()
    eventually(lambda: unstarted.status()["engine_restarts"] == 1)
    assert unstarted.ask().json["choices"] == answer
    status = unstarted.status()
    assert (status["state"], status["engine_restarts"], status["requests"]["failed"]) == ("serving", 1, 0)


def test_an_engine_that_dies_in_the_middle_of_an_answer_ends_it_with_an_error(unstarted: DaemonProcess) -> None:
    unstarted.start()
    body = {"messages": [{"role": "user", "content": "Write a story."}], "max_tokens": 900, "temperature": 0}
    with streaming(unstarted.api, "/v1/chat/completions", body) as events:
        first = next(events)
        for child in engines(unstarted):
            child.kill()
        *_, last = events
    assert last["error"]["code"] == "engine_died"
    assert "send it again" in last["error"]["message"]
    eventually(unstarted.status)
    assert unstarted.inference(first["id"])["finish_reason"] == "error"


def test_sigterm_answers_what_is_open_and_leaves(unstarted: DaemonProcess) -> None:
    unstarted.start()
    children = engines(unstarted)
    answers: list[Answer] = []
    begun = unstarted.status()["requests"]["served"]
    ask = {"max_tokens": 30, "temperature": 0, "logit_bias": {"2": -100}}  # without an end of turn
    threads = [threading.Thread(target=lambda: answers.append(unstarted.ask("Tell me more.", **ask))) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: unstarted.status()["requests"]["active"] == 3)
    assert unstarted.stop() == 0
    for thread in threads:
        thread.join(10)
    assert begun == 0
    assert [answer.status for answer in answers] == [200] * 3
    assert {answer.json["usage"]["completion_tokens"] for answer in answers} == {30}
    assert not unstarted.api.exists()
    assert not unstarted.admin.exists()
    eventually(lambda: not any(map(lives, children)), 5)
    assert "Traceback" not in unstarted.log
    assert "Task was destroyed" not in unstarted.log
    assert "never awaited" not in unstarted.log


def test_what_sigterm_cannot_wait_for_is_told_so(unstarted: DaemonProcess) -> None:
    unstarted.start()
    ask = {"messages": [{"role": "user", "content": "Tell me more."}], "max_tokens": 4}
    answers: list[Answer] = []
    plain = [
        threading.Thread(target=lambda path=path, body=body: answers.append(unstarted.post(path, body)))
        for path, body in (("/v1/chat/completions", ask), ("/v1/embeddings", {"input": "more"}))
    ]
    with streaming(unstarted.api, "/v1/chat/completions", {**ask, "max_tokens": 900}) as events:
        next(events)
        for child in engines(unstarted):
            child.suspend()  # a board that is slow
        for thread in plain:
            thread.start()
        eventually(lambda: unstarted.status()["requests"]["active"] == 3)
        assert unstarted.stop() == 0
        *_, last = events
    for thread in plain:
        thread.join(10)
    for error in (last["error"], *(answer.error for answer in answers)):
        assert (error["code"], error["message"]) == ("engine_unavailable", "agentd is stopping")
    assert [answer.status for answer in answers] == [503, 503]
    assert "Traceback" not in unstarted.log


def test_sigterm_while_the_model_loads(unstarted: DaemonProcess) -> None:
    unstarted.start(wait=False)
    eventually(unstarted.admin.exists)
    children = psutil.Process(unstarted.pid).children(recursive=True)
    assert unstarted.stop() == 0
    assert not unstarted.api.exists()
    eventually(lambda: not any(map(lives, children)), 5)
    assert "Traceback" not in unstarted.log


def test_sigterm_as_soon_as_a_socket_is_there(unstarted: DaemonProcess) -> None:
    unstarted.wrapper = [sys.executable, "-c", _TERMINATED_ONCE_BOUND]
    unstarted.start(wait=False)
    assert unstarted.process is not None
    assert unstarted.process.wait(60) == 0
    assert not unstarted.api.exists()
    assert not unstarted.admin.exists()
    assert "Traceback" not in unstarted.log


def test_readiness_is_told_to_the_service_manager(model_path: Path) -> None:
    with DaemonProcess(model_path) as daemon, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = daemon.directory / "notify"
        manager.bind(str(address))
        manager.settimeout(30)
        daemon.environment["NOTIFY_SOCKET"] = str(address)
        daemon.start(wait=False)
        said = ""
        while "READY=1" not in said:
            said = manager.recv(4096).decode()
        assert "serving revision 0" in said
        assert daemon.get("/health").status == 200
        daemon.stop()
        while "STOPPING=1" not in said:
            said = manager.recv(4096).decode()
