import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scripted_daemon import Answer, ScriptedDaemon, command


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        yield daemon


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "invalid_request", 1),
        (404, "not_found", 4),
        (409, "pass_refused", 5),
        (500, "x", 1),
        (507, "storage_full", 1),
    ],
)
def test_the_exit_code_follows_the_daemons_answer(
    daemon: ScriptedDaemon, status: int, code: str, exit_code: int
) -> None:
    daemon.refuse("POST /admin/adapt", status, "it is\nso", code)
    result = daemon.run("adapt")
    assert (result.returncode, result.stdout, result.stderr) == (exit_code, "", "agentctl: it is so\n")


def test_a_revision_that_does_not_exist(daemon: ScriptedDaemon) -> None:
    assert daemon.run("show", "99").returncode == 4
    result = daemon.run("rollback", "99", "--dry-run")
    assert (result.returncode, "there is no revision 99" in result.stderr) == (4, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["show"],
        ["show", "two"],
        ["passes", "--limit", "0"],
        ["adapt", "--blocks", "some"],
        ["feedback", "add", "last"],
        ["feedback", "add", "last", "--label", "a", "--comment", "b"],
        ["feedback", "add", "last", "--rejected", "b"],
        ["feedback", "add", "last", "--boolean", "maybe"],
        ["feedback", "add", "last", "--label", "a", "--tag", "x"],
        ["feedback", "import", "/nonexistent.jsonl"],
        ["inferences", ".."],
    ],
)
def test_wrong_usage_is_one_line_and_code_2(daemon: ScriptedDaemon, arguments: list[str]) -> None:
    result = daemon.run(*arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert not [request for request in daemon.requests if request.method == "POST"]


@pytest.mark.parametrize("arguments", [[], ["feedback"]])
def test_no_command_shows_the_help(daemon: ScriptedDaemon, arguments: list[str]) -> None:
    result = daemon.run(*arguments)
    assert (result.returncode, "Commands:" in result.stdout) == (2, True)


def test_no_socket(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    result = daemon.run("status", AGENTD_ADMIN_SOCKET=str(tmp_path / "none.sock"))
    assert (result.returncode, result.stderr.count("\n")) == (3, 1)
    assert "there is no socket; start it" in result.stderr


def test_a_socket_that_a_killed_daemon_left(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    result = daemon.run("status", "--socket", str(path))
    assert (result.returncode, "nobody listens" in result.stderr) == (3, True)


def test_a_socket_path_beyond_what_unix_allows(daemon: ScriptedDaemon) -> None:
    result = daemon.run("status", "--socket", "/tmp/" + "x" * 120)
    assert (result.returncode, result.stderr.count("\n")) == (3, 1)


def test_a_daemon_that_hangs_up(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    path = tmp_path / "rude.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            command(["status", "--socket", str(path)]), stderr=subprocess.PIPE, text=True, env=daemon.environment()
        )
        listener.accept()[0].close()
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, "hung up" in stderr) == (3, True)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b""])
def test_something_else_than_agentd_behind_the_socket(daemon: ScriptedDaemon, body: bytes) -> None:
    daemon.on("GET /admin/status", Answer(body))
    result = daemon.run("status")
    assert (result.returncode, "is not agentd" in result.stderr) == (1, True)


def test_a_reader_that_leaves_is_no_error_message(daemon: ScriptedDaemon) -> None:
    line = " ".join(command(["passes"]))
    # the reader is gone before agentctl writes
    result = subprocess.run(
        ["bash", "-c", f"(sleep 0.1; {line}) | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env=daemon.environment(),
    )
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_a_terminal_without_unicode_still_gets_its_answer(daemon: ScriptedDaemon) -> None:
    result = daemon.run("pass", "7", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert result.returncode == 0
    code, screen = daemon.on_terminal("pass", "7", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (code, "loss of 32" in screen) == (0, True)
