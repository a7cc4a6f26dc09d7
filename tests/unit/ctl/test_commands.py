import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from agentd.ctl.app import app
from agentd.ctl.client import default_socket
from agentd.ctl.errors import MEANINGS
from tests.support.scripted_daemon import RECORDED, Answer, ScriptedDaemon, command

REFERENCE = Path(__file__).parents[3] / "docs" / "agentctl.md"


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        yield daemon


def commands(group: Any = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    group = group or typer.main.get_command(app)
    for name, entry in group.commands.items():
        yield f"{prefix}{name}", entry
        if hasattr(entry, "commands"):
            yield from commands(entry, f"{prefix}{name} ")


LISTS = {
    ("status",): "GET /admin/status",
    ("history",): "GET /admin/history",
    ("revisions",): "GET /admin/revisions",
    ("show", "2"): "GET /admin/revisions/2",
    ("passes",): "GET /admin/passes",
    ("pass", "7"): "GET /admin/passes/7",
    ("feedback", "list"): "GET /admin/feedback",
    ("examples",): "GET /admin/examples",
    ("tasks",): "GET /admin/tasks",
    ("inferences",): "GET /admin/inferences",
    ("log",): "GET /admin/inferences",
    ("events",): "GET /admin/events",
    ("key", "list"): "GET /admin/keys",
    ("key", "add", "home"): "POST /admin/keys",
    ("key", "revoke", "home"): "POST /admin/keys/home/revoke",
    ("pause",): "POST /admin/pause",
    ("resume",): "POST /admin/resume",
    ("cancel",): "POST /admin/cancel",
    ("adapt", "--no-wait"): "POST /admin/adapt",
    ("rollback", "-y"): "POST /admin/rollback",
}


@pytest.mark.parametrize("arguments", LISTS)
def test_json_is_the_daemons_answer_as_it_came(daemon: ScriptedDaemon, arguments: tuple[str, ...]) -> None:
    result = daemon.run(*arguments, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == RECORDED[LISTS[arguments]]


def test_a_pipe_gets_one_line_of_raw_values_per_row(daemon: ScriptedDaemon) -> None:
    result = daemon.run("passes")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == ["7", "6"]
    assert rows[0][8] == str(480 * 2**20)
    assert rows[1][9:] == ["", "", "4.0 MiB short"]
    assert len(rows[0]) == len(rows[1]) == 12


def test_tabs_and_newlines_inside_a_value_do_not_break_the_rows(daemon: ScriptedDaemon) -> None:
    rows = [line.split("\t") for line in daemon.run("examples").stdout.splitlines()]
    assert [len(row) for row in rows] == [8, 8]
    value = rows[0][7].replace("\\\\", "\\")
    assert json.loads(value)["messages"][0]["content"] == "a fine\tfilm\nindeed"


def test_a_terminal_gets_a_table_with_units(daemon: ScriptedDaemon) -> None:
    code, screen = daemon.on_terminal("passes", COLUMNS="200")
    assert code == 0
    assert "predicted" in screen
    assert "480.0 MiB" in screen
    assert "\x1b[1m" in screen
    assert "\t" not in screen


def test_no_color_leaves_no_colour(daemon: ScriptedDaemon) -> None:
    daemon.on("GET /admin/progress", Answer(RECORDED["GET /admin/progress"]))
    _, coloured = daemon.on_terminal("adapt")
    _, plain = daemon.on_terminal("adapt", NO_COLOR="1")
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-9]|38;5;\d+)m")
    assert colour.search(coloured)
    assert not colour.search(plain)


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(daemon: ScriptedDaemon) -> None:
    _, screen = daemon.on_terminal("inferences", COLUMNS="200")
    assert "\x1b[2J" not in screen
    assert "posi\N{REPLACEMENT CHARACTER}[2Jtive" in screen


def test_status_tells_a_person_what_matters(daemon: ScriptedDaemon) -> None:
    code, screen = daemon.on_terminal("status")
    assert code == 0
    assert "sentiment: about 65 more until the next pass" in screen
    assert "370.0 MiB (daemon 70.0 MiB, engine 300.0 MiB)" in screen
    assert "1 h 02 min" in screen


def test_show_draws_before_and_after_of_each_task(daemon: ScriptedDaemon) -> None:
    _, screen = daemon.on_terminal("show", "2")
    assert re.search(r"sentiment\s+0\.54\s+0\.9\s+120", screen)
    assert "2 ← 1 ← 0" in screen
    assert re.search(r"arithmetic\s+0\.81\s+0\.8\s+20\s+0\.31", screen)
    assert "manifest.skills" not in screen
    assert "manifest.skills.arithmetic.after\t0.8" in daemon.run("show", "2").stdout


def test_tasks_and_history_draw_accuracy_over_time(daemon: ScriptedDaemon) -> None:
    for name in ("tasks", "history"):
        _, screen = daemon.on_terminal(name)
        assert "sentiment: right answers of 60 that were judged, 2026-01-30 to 2026-01-31" in screen
        assert re.search(r"r0 +r1 +r2", screen)
    assert "0.7667" in daemon.on_terminal("tasks")[1]
    (row,) = daemon.run("tasks").stdout.splitlines()
    assert row.split("\t")[8:11] == ["60", "0.7666666666666667", "1.0"]


def test_diff_lists_only_what_differs(daemon: ScriptedDaemon) -> None:
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in daemon.run("diff", "1", "2").stdout.splitlines()}
    assert rows["summary.sentiment.after"] == ["0.85", "0.9"]
    assert rows["parent"] == ["0", "1"]
    assert "summary.sentiment.n" not in rows


def test_pass_draws_the_loss_curve_of_each_phase(daemon: ScriptedDaemon) -> None:
    _, screen = daemon.on_terminal("pass", "7")
    assert "loss of 32 backpropagation steps" in screen
    assert "loss of 8 zeroth-order steps" in screen
    assert re.search("2\\.37 ┤[\u2801-\u28ff]", screen)
    assert "0.610 → 0.610" in screen
    assert screen.index("pass 7 triggered") < screen.index("revision 2 committed")


def test_pass_shows_what_was_answered_at_the_gate(daemon: ScriptedDaemon) -> None:
    answer = copy.deepcopy(RECORDED["GET /admin/passes/7"])
    entry = {
        "example": "e1",
        "input": "Light\x1b[2J on!",
        "right": "on({})",
        "before": "Sure.\nDone.",
        "after": "on({})",
    }
    figures = {"n": 30, "before": {"accuracy": 0.1}, "answers": [{**entry, "before_right": False, "after_right": True}]}
    skills = {"json": {"n": 20, "before": 0.75, "after": 0.74, "p": 0.4}}
    answer["pass"]["gate"] = {"accepted": True, "tasks": {"home": figures}, "skills": skills}
    daemon.on("GET /admin/passes/7", Answer(answer))
    _, screen = daemon.on_terminal("pass", "7", COLUMNS="160")
    assert "answers of task home at the gate" in screen
    assert "\x1b[2J" not in screen
    assert re.search(r"before ✗\s+Sure\.\s+Done\.\s+after ✓\s+on\({}\)", screen)
    facts = daemon.run("pass", "7").stdout
    assert "gate.tasks.home.before.accuracy\t0.1" in facts
    assert "Sure" not in facts
    assert re.search(r"json\s+0\.75\s+0\.74\s+20\s+0\.4", screen)
    assert "gate.skills.json.after\t0.74" in facts
    assert json.loads(daemon.run("pass", "7", "--json").stdout) == answer


def test_pass_lists_its_steps(daemon: ScriptedDaemon) -> None:
    rows = [line.split("\t") for line in daemon.run("pass", "7", "--steps").stdout.splitlines()]
    assert len(rows) == 40
    assert rows[-1][6] == str(2**63 + 8)


def test_events_come_in_the_order_they_happened(daemon: ScriptedDaemon) -> None:
    assert [line.split("\t")[0] for line in daemon.run("events").stdout.splitlines()] == ["1", "2"]


def test_events_follow_prints_new_ones_once(daemon: ScriptedDaemon) -> None:
    later = {"id": 3, "at": "2026-01-31T12:00:03.000Z", "kind": "swap", "message": "m", "pass_id": None, "revision": 2}
    daemon.on("GET /admin/events", Answer(RECORDED["GET /admin/events"]), Answer({"events": [later]}))
    process = subprocess.Popen(
        command(["events", "-f", "--json"]), stdout=subprocess.PIPE, text=True, env=daemon.environment()
    )
    assert process.stdout is not None
    try:
        assert [json.loads(process.stdout.readline())["id"] for _ in range(3)] == [1, 2, 3]
    finally:
        process.kill()
        process.communicate()
    assert daemon.asked_for("GET /admin/events")[1].query["after"] == "2"


def test_rollback_dry_run_changes_nothing(daemon: ScriptedDaemon) -> None:
    result = daemon.run("rollback", "--dry-run")
    assert result.stdout == "revision 1 (committed) would serve instead of revision 2\n"
    assert not daemon.asked_for("POST /admin/rollback")


def test_rollback_asks_on_a_terminal(daemon: ScriptedDaemon) -> None:
    code, screen = daemon.on_terminal("rollback", "0", typed="n\n")
    assert (code, "Go on?" in screen) == (1, True)
    assert not daemon.asked_for("POST /admin/rollback")
    code, screen = daemon.on_terminal("rollback", "0", "--reason", "worse", typed="y\n")
    assert code == 0
    assert "revision 1 serves instead of 2 (swapped in 3.5 ms)" in screen
    assert daemon.asked_for("POST /admin/rollback")[0].json == {"revision": 0, "reason": "worse"}


def test_rollback_in_a_script_needs_yes(daemon: ScriptedDaemon) -> None:
    result = daemon.run("rollback", "1")
    assert (result.returncode, "add -y" in result.stderr) == (2, True)
    assert not daemon.asked_for("POST /admin/rollback")
    assert daemon.run("rollback", "1", "-y").returncode == 0


def test_ask_streams_the_answer_and_names_the_revision(daemon: ScriptedDaemon) -> None:
    chunks = [
        {"id": "019c", "agentd": {"revision": 2}, "choices": [{"delta": {"content": piece}}]} for piece in ("Hel", "lo")
    ]
    daemon.on("POST /v1/chat/completions", Answer(chunks))
    result = daemon.run("ask", "Hi", "--task", "sentiment", "--temperature", "0")
    assert result.stdout == "Hello\n"
    assert "revision 2, id 019c" in result.stderr
    body = daemon.asked_for("POST /v1/chat/completions")[0].json
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert (body["stream"], body["temperature"], body["model"]) == (True, 0.0, "SmolLM2-135M-Instruct")


def test_an_error_in_the_middle_of_a_stream_is_an_error(daemon: ScriptedDaemon) -> None:
    error = {"error": {"message": "the engine stopped", "type": "unavailable_error", "code": "engine_died"}}
    daemon.on("POST /v1/chat/completions", Answer([{"choices": [{"delta": {"content": "Hel"}}]}, error]))
    result = daemon.run("ask", "Hi")
    assert (result.returncode, result.stderr) == (1, "agentctl: the engine stopped\n")


def test_a_new_key_goes_to_stdout_and_what_it_is_to_stderr(daemon: ScriptedDaemon) -> None:
    result = daemon.run("key", "add", "home", "--scope", "ask, admin", "--rate", "60/min")
    assert (result.returncode, result.stdout) == (0, "agentd_secret\n")
    assert "not shown again" in result.stderr
    body = daemon.asked_for("POST /admin/keys")[0].json
    assert body == {"name": "home", "scopes": ["ask", "admin"], "rate": 60}
    for wrong in (["--scope", "write"], ["--scope", ""], ["--rate", "fast"], ["--rate", "5/s"]):
        assert daemon.run("key", "add", "home", *wrong).returncode == 2
    (row,) = daemon.run("key", "list").stdout.splitlines()
    assert row.split("\t")[:3] == ["home", '["ask", "feedback"]', "60"]


def door(address: str, **changes: bool) -> dict[str, Any]:
    return {"address": address, "tls": False, "needs_key": True, "open": True, **changes}


@pytest.mark.parametrize(
    ("entry", "state", "finding", "advice"),
    [
        (door("127.0.0.1:80", needs_key=False), "ok", "every program of this machine", ""),
        (door("0.0.0.0:80", tls=True), "ok", "https://0.0.0.0:80, with one of 1 API keys", ""),
        (door("0.0.0.0:80"), "warning", "can be read", "serve.tls"),
        (door("[::]:80", open=False), "warning", "no one gets in", "agentctl key add"),
    ],
)
def test_doctor_says_how_it_is_reached(
    daemon: ScriptedDaemon, entry: dict[str, Any], state: str, finding: str, advice: str
) -> None:
    daemon.on("GET /admin/status", Answer(RECORDED["GET /admin/status"] | {"tcp": [entry], "keys": 1}))
    rows = [line.split("\t") for line in daemon.run("doctor").stdout.splitlines()]
    (row,) = [row for row in rows if row[1] == "reach"]
    assert (row[0], finding in row[2], advice in row[3]) == (state, True, True)


def test_doctor_is_content_with_a_healthy_daemon(daemon: ScriptedDaemon) -> None:
    result = daemon.run("doctor", "--json")
    checks = {check["check"]: check["state"] for check in json.loads(result.stdout)["checks"]}
    assert set(checks) >= {"socket", "permissions", "daemon", "model", "learning", "disk", "memory", "sqlite"}
    assert "error" not in checks.values()
    assert result.returncode == 0


def test_doctor_says_what_to_do_about_each_fault(daemon: ScriptedDaemon) -> None:
    status = RECORDED["GET /admin/status"]
    memory = status["memory"] | {"available_bytes": 2**20}
    daemon.on("GET /admin/status", Answer(status | {"state": "degraded", "memory": memory, "version": "0.0.9"}))
    daemon.socket.chmod(0o666)
    result = daemon.run("doctor")
    rows = {line.split("\t")[1]: line.split("\t") for line in result.stdout.splitlines()}
    assert {name for name, row in rows.items() if row[0] == "error"} == {"permissions", "model", "memory"}
    assert rows["permissions"][3] == f"chmod 600 {daemon.socket}"
    assert rows["version"][0] == "warning"
    assert all(row[3] for row in rows.values() if row[0] != "ok")
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"held": {"battery": "the battery is at 12 %"}}, "at 12 %"),
        ({"last_pass": {"id": 7, "state": "refused", "reason": "no labels"}}, "pass 7, the last one, was refused"),
        ({"backpropagation": {"supported": False, "reason": "no such model"}}, "no such model"),
        (
            {"backpropagation": {"supported": True, "most_blocks": 3, "reason": "block 5 is another"}},
            "last 3 blocks at most: block 5 is another",
        ),
    ],
)
def test_doctor_warns_of_what_keeps_passes_from_learning(
    daemon: ScriptedDaemon, changes: dict[str, Any], finding: str
) -> None:
    daemon.on("GET /admin/status", Answer(RECORDED["GET /admin/status"] | changes))
    rows = [line.split("\t") for line in daemon.run("doctor").stdout.splitlines()]
    warnings = [row for row in rows if row[:2] == ["warning", "learning"]]
    assert [finding in row[2] and bool(row[3]) for row in warnings] == [True]
    assert ["ok", "learning"] not in [row[:2] for row in rows]


def test_doctor_says_how_fast_the_model_is(daemon: ScriptedDaemon) -> None:
    def finding() -> str:
        rows = [line.split("\t") for line in daemon.run("doctor").stdout.splitlines()]
        return next(row[2] for row in rows if row[:2] == ["ok", "speed"])

    assert finding() == "512.5 tokens/s read (800 at once), 61 tokens/s written, with 4 threads"
    busy = {"error": {"message": "2 requests are being served; measure when none is", "type": "", "code": "conflict"}}
    daemon.on("POST /admin/speed", Answer(busy, status=409))
    assert finding() == "not measured: 2 requests are being served; measure when none is"


def test_doctor_shows_its_advice_whole_on_a_narrow_terminal(daemon: ScriptedDaemon) -> None:
    daemon.socket.chmod(0o666)
    _, screen = daemon.on_terminal("doctor", COLUMNS="70")
    assert "✗" in screen
    assert "…" not in screen


def test_doctor_works_without_a_daemon(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    result = daemon.run("doctor", "--socket", str(tmp_path / "none.sock"))
    rows = {line.split("\t")[1]: line.split("\t") for line in result.stdout.splitlines()}
    assert rows["socket"][0] == "error"
    assert "start" in rows["daemon"][3]
    assert {"disk", "memory", "sqlite"} <= rows.keys()
    assert result.returncode == 3


def test_version_names_both_sides(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    assert "agentd\t0.1.0" in daemon.run("version").stdout
    alone = daemon.run("version", "--socket", str(tmp_path / "none.sock"))
    assert (alone.returncode, "agentd\tnot reachable" in alone.stdout) == (0, True)


def test_socket_option_goes_before_or_after_the_command(daemon: ScriptedDaemon) -> None:
    elsewhere = "/nonexistent/admin.sock"
    for arguments in (["--socket", str(daemon.socket), "tasks"], ["tasks", "--socket", str(daemon.socket)]):
        result = daemon.run(*arguments, AGENTD_ADMIN_SOCKET=elsewhere)
        assert result.stdout.startswith(
            'sentiment\t["positive", "negative"]\tfalse\taccuracy\tconfig\t12\t500\t120\t60\t'
        )
        assert result.stdout.endswith("\tauto\ttrue\t4\tit helps\n")


def test_default_socket_is_the_first_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, state = tmp_path / "runtime", tmp_path / "state"
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(runtime))
    monkeypatch.setenv("STATE_DIRECTORY", str(state))
    monkeypatch.setattr("agentd.ctl.client.SYSTEM_SOCKET", tmp_path / "system.sock")
    assert default_socket() == runtime / "admin.sock"
    state.mkdir()
    (state / "admin.sock").touch()
    assert default_socket() == state / "admin.sock"


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_and_option_has_help(name: str) -> None:
    command = dict(commands())[name]
    assert command.help, f"{name} has no help"
    for parameter in command.params:
        assert parameter.help or "--help" in parameter.opts, f"{name} {parameter.name} has no help"


@pytest.mark.parametrize("name", [name for name, command in commands() if not command.hidden])
def test_every_command_and_option_is_in_the_reference(name: str) -> None:
    entry = dict(commands())[name]
    sections = re.split(r"^### ", REFERENCE.read_text(), flags=re.MULTILINE)
    section = next((part for part in sections if re.match(rf"`agentctl {name}(`| [A-Z\[])", part)), None)
    assert section is not None, f"docs/agentctl.md has no section on {name}"
    for parameter in entry.params:
        option = parameter.opts[0]
        if option.startswith("--") and option not in ("--json", "--socket", "--help"):
            assert f"`{option}" in section, f"docs/agentctl.md does not tell of {name} {option}"


def test_the_reference_has_no_command_that_is_gone() -> None:
    names = {name for name, _ in commands()}
    for documented in re.findall(
        r"^### `agentctl ([a-z ]+?)(?: [A-Z\[].*)?`", REFERENCE.read_text(), flags=re.MULTILINE
    ):
        assert documented in names


def test_exit_codes_are_in_the_help_and_in_the_reference(daemon: ScriptedDaemon) -> None:
    text = daemon.run("--help").stdout
    for code, meaning in MEANINGS.items():
        assert re.search(rf"^ *{int(code)}  {meaning}$", text, flags=re.MULTILINE)
        assert f"| {int(code)} | {meaning} |" in REFERENCE.read_text()


def test_help_is_quick_and_rich_stays_out_of_a_pipe(daemon: ScriptedDaemon) -> None:
    before = os.times()
    assert daemon.run("--help").returncode == 0
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    code = (
        "import sys; from agentd.ctl.app import run; run(['passes']); "
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('rich', 'torch', 'starlette', 'yaml', 'numpy')), "
        "sorted(m for m in sys.modules if m.startswith('agentd.') and not m.startswith('agentd.ctl')), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=daemon.environment())
    assert result.stderr == "[] ['agentd.config', 'agentd.config.paths']\n"
