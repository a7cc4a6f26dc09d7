import copy
import json
from collections.abc import Iterator

import pytest

from agentd.ctl.top import Rate, frame
from tests.support.scripted_daemon import RECORDED, Answer, ScriptedDaemon


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        yield daemon


def test_once_prints_all_of_it(daemon: ScriptedDaemon) -> None:
    result = daemon.run("top", "--once")
    assert (result.returncode, result.stderr) == (0, "")
    for text in ("revision 2", "daemon 70.0 MiB", "served", "sentiment", "100.0%", "pass 7"):
        assert text in result.stdout
    event = RECORDED["GET /admin/events"]["events"][-1]
    assert f"{event['at'][11:19]}  {event['kind']}: " in result.stdout


def test_once_as_json_is_what_the_daemon_says(daemon: ScriptedDaemon) -> None:
    look = json.loads(daemon.run("top", "--once", "--json").stdout)
    assert look["status"] == RECORDED["GET /admin/status"]
    assert look["tasks"] == RECORDED["GET /admin/tasks"]["tasks"]
    assert look["events"] == RECORDED["GET /admin/events"]["events"]


def test_q_leaves_and_the_terminal_is_as_it_was(daemon: ScriptedDaemon) -> None:
    code, screen = daemon.on_terminal("top", "--interval", "0.2", talk=[("sentiment", "q")])
    assert code == 0
    assert screen.index("\x1b[?1049h") < screen.index("sentiment") < screen.index("\x1b[?1049l")
    assert screen.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in screen  # the cursor is back


def test_a_pipe_is_told_what_to_do(daemon: ScriptedDaemon) -> None:
    result = daemon.run("top")
    assert result.returncode == 2
    assert "--once" in result.stderr


def test_a_daemon_that_is_away_is_waited_for(daemon: ScriptedDaemon) -> None:
    daemon.on("GET /admin/status", Answer(b"", 200))
    assert daemon.run("top", "--once").returncode == 1  # not agentd's answer
    daemon.stop()
    try:
        assert daemon.run("top", "--once").returncode == 3
        code, _screen = daemon.on_terminal("top", "--interval", "0.2", talk=[("waiting for the daemon", "q")])
        assert code == 0
    finally:
        daemon.start()


def test_a_picture_is_no_higher_than_the_terminal() -> None:
    look = {
        "status": copy.deepcopy(RECORDED["GET /admin/status"]),
        "tasks": RECORDED["GET /admin/tasks"]["tasks"] * 30,
        "events": RECORDED["GET /admin/events"]["events"] * 20,
    }
    look["status"]["problem"] = "evil \x1b[2J text"
    for height in (5, 12, 60):
        text = frame(look, Rate(), height).plain
        assert len(text.split("\n")) < height
        assert "\x1b" not in text


def test_the_last_pass_stands_under_what_learning_waits_for() -> None:
    status = copy.deepcopy(RECORDED["GET /admin/status"])
    status |= {"pass": None, "last_pass": {"id": 3, "state": "rejected", "reason": "no better"}}
    lines = frame({"status": status, "tasks": [], "events": []}, Rate(), 40).plain.split("\n")
    (at,) = (i for i, line in enumerate(lines) if line.startswith("learning"))
    assert lines[at + 1] == " " * 10 + "last: pass 3 rejected: no better"


def test_the_rate_begins_anew_with_the_daemon() -> None:
    rate = Rate()
    for at, served in ((0.0, 0), (1.0, 4), (2.0, 4), (3.0, 1)):
        rate.note(at, served)
    assert rate.ticks == []
    rate.note(5.0, 3)
    assert rate.ticks == [1.0]
