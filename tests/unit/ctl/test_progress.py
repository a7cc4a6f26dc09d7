import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from agentd.ctl import progress
from agentd.ctl.client import Daemon
from agentd.ctl.errors import NotReachable
from tests.support.scripted_daemon import RECORDED, Answer, ScriptedDaemon, command

PASS = RECORDED["GET /admin/passes/7"]


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        yield daemon


def at(phase: str, step: int = 0, steps: int = 0, **more: Any) -> Answer:
    base = RECORDED["GET /admin/progress"]["pass"] | {"done": False, "outcome": None}
    return Answer({"pass": base | {"phase": phase, "step": step, "steps": steps} | more})


def ended(state: str, reason: str | None = None) -> Answer:
    return Answer(PASS | {"pass": PASS["pass"] | {"state": state, "reason": reason, "revision": None}})


def test_adapt_follows_the_pass_to_its_commit(daemon: ScriptedDaemon) -> None:
    done = at("trial", done=True, outcome="committed")
    daemon.on("GET /admin/progress", at("tap", 3, 10), at("train", 12, 64), at("train", 13, 64), done)
    result = daemon.run("adapt", "--method", "elasticzo", "--blocks", "2", "--zo-steps", "auto")
    assert result.returncode == 0
    assert daemon.asked_for("POST /admin/adapt")[0].json == {"method": "elasticzo", "blocks": 2, "zo_steps": "auto"}
    lines = result.stderr.splitlines()
    assert lines[:2] == [
        "pass 7 started",
        "pass 7: tap 3/10 loss 0.512 dev loss 0.610 accuracy 0.710 412.0 MiB of 480.0 MiB 1 min 23 s left",
    ]
    assert [line.split()[2] for line in lines[1:]] == ["tap", "train", "trial"]
    assert result.stdout == "pass\t7\nstate\tcommitted\nrevision\t2\n"


def test_a_terminal_shows_a_bar_for_each_phase(daemon: ScriptedDaemon) -> None:
    done = at("trial", done=True, outcome="committed")
    daemon.on("GET /admin/progress", at("tap", 3, 10), at("train", 12, 64), done)
    code, screen = daemon.on_terminal("adapt", COLUMNS="160")
    assert code == 0
    for expected in ("tap", "train", "12/64", "loss 0.512", "412.0 MiB of 480.0 MiB", "1 min 23 s left", "━"):
        assert expected in screen
    assert "pass 7 committed: revision 2 serves now" in screen


@pytest.mark.parametrize(
    ("outcome", "exit_code"), [("rejected", 6), ("failed", 6), ("rolled_back", 6), ("refused", 5), ("committed", 0)]
)
def test_the_exit_code_tells_how_the_pass_ended(daemon: ScriptedDaemon, outcome: str, exit_code: int) -> None:
    daemon.on("GET /admin/progress", at("gate", done=True, outcome=outcome, reason="no better"))
    daemon.on("GET /admin/passes/7", ended(outcome, "no better"))
    result = daemon.run("adapt")
    assert result.returncode == exit_code
    assert f"state\t{outcome}\n" in result.stdout
    assert "reason\tno better\n" in result.stdout


def test_json_prints_the_whole_pass_at_its_end_and_nothing_else(daemon: ScriptedDaemon) -> None:
    result = daemon.run("adapt", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert '"n_holdout": 120' in result.stdout


def test_dry_run_prints_the_plan(daemon: ScriptedDaemon) -> None:
    term = {"process": "engine", "name": "weights", "bytes": 1024, "formula": "all of them", "reduce": ""}
    plan = {"method": "elasticzo", "predicted": {"weights": 1024}, "terms": [term], "considered": [{"blocks": 1}]}
    daemon.on("POST /admin/adapt", Answer({"plan": plan}))
    result = daemon.run("adapt", "--dry-run")
    assert result.stdout == "method\telasticzo\npredicted.weights\t1024\n"
    assert daemon.asked_for("POST /admin/adapt")[0].json == {"dry_run": True}
    assert json.loads(daemon.run("adapt", "--dry-run", "--json").stdout)["plan"] == plan
    assert not daemon.asked_for("GET /admin/progress")


def test_ctrl_c_detaches_and_says_how_to_cancel(daemon: ScriptedDaemon) -> None:
    daemon.on("GET /admin/progress", at("train", 1, 64))
    process = subprocess.Popen(
        command(["adapt"]),
        stderr=subprocess.PIPE,
        text=True,
        env=daemon.environment(),
        # a shell starts what runs in its background with the signal ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    first = [process.stderr.readline(), process.stderr.readline()]
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert "train 1/64" in first[1]
    assert process.returncode == 130
    assert "detached; pass 7 goes on" in rest
    assert "`agentctl cancel`" in rest
    assert not daemon.asked_for("POST /admin/cancel")


def test_a_pass_can_be_followed_again(daemon: ScriptedDaemon) -> None:
    result = daemon.run("pass", "7", "-f")
    assert (result.returncode, result.stdout.splitlines()[1]) == (0, "state\tcommitted")


def test_a_pass_that_is_over_and_forgotten_ends_at_once(daemon: ScriptedDaemon) -> None:
    daemon.on("GET /admin/progress", Answer({"pass": None}))
    daemon.on("GET /admin/passes/7", ended("failed", "the trainer was killed"))
    assert daemon.run("pass", "7", "-f").returncode == 6


def test_a_restarting_daemon_is_waited_for(daemon: ScriptedDaemon) -> None:
    daemon.on("GET /admin/progress", at("train", 1, 64), Answer({"pass": None}))
    daemon.on("GET /admin/passes/7", ended("failed", "agentd was restarted"))
    acts = iter([daemon.stop, lambda: None, daemon.start])
    said: list[str] = []
    view = progress.Lines(say=said.append)
    result = progress.follow(Daemon(daemon.socket), 7, view, sleep=lambda seconds: next(acts)())
    assert (result.outcome, result.reason, result.exit_code) == ("failed", "agentd was restarted", 6)
    assert sum("waiting for the daemon" in line for line in said) == 1


def test_a_daemon_that_stays_away_ends_the_wait(daemon: ScriptedDaemon) -> None:
    clock = iter(range(0, 1000, 25))
    silent = progress.view(quiet=True)
    elsewhere = Daemon(daemon.socket.with_name("none.sock"))
    with pytest.raises(NotReachable):
        progress.follow(elsewhere, 7, silent, sleep=lambda seconds: None, clock=lambda: next(clock))
    assert next(clock) > progress.PATIENCE


def test_plain_lines_come_with_each_phase_and_every_ten_seconds() -> None:
    now = 0.0
    said: list[str] = []
    view = progress.Lines(say=said.append, clock=lambda: now)
    for second in range(25):
        now = float(second)
        view.show(at("train" if second else "tap", second, 64).body["pass"])
    assert [line.split()[2:4] for line in said] == [
        ["tap", "0/64"],
        ["train", "1/64"],
        ["train", "11/64"],
        ["train", "21/64"],
    ]
