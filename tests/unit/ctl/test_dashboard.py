import re
import socket
from collections.abc import Iterator

import pytest

from tests.support.scripted_daemon import Answer, ScriptedDaemon


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        offers = [{"token": f"token{i}", "expires_seconds": 300, "tcp": []} for i in range(3)]
        daemon.on("POST /admin/dashboard", *map(Answer, offers))
        yield daemon


def test_an_address_is_printed_and_another_one_on_enter(daemon: ScriptedDaemon) -> None:
    talk = [("Enter prints another address", "\n"), ("token1", "\x04")]
    code, screen = daemon.on_terminal("dashboard", talk=talk)
    assert code == 0
    first, second = re.findall(r"http://127\.0\.0\.1:(\d+)/ui/#key=token[01]", screen)
    assert first == second
    assert f"ssh -L {first}:127.0.0.1:{first}" in screen


def test_a_port_that_is_taken_is_named(daemon: ScriptedDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = daemon.run("dashboard", "--port", str(other.getsockname()[1]))
    assert result.returncode == 2
    assert "cannot be used" in result.stderr
