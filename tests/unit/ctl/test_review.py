import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_daemon import Answer, ScriptedDaemon

TOOLS = [{"type": "function", "function": {"name": "lights", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "a", "type": "function", "function": {"name": "lights", "arguments": '{"on": true}'}}
ASKED = "[q]uit"


def answer(id: str, text: str, **more: Any) -> dict[str, Any]:
    row = {"id": id, "created_at": "2026-01-31T12:00:00.000Z", "revision": 2, "task": None, "episode": None}
    input = {"messages": [{"role": "user", "content": f"question {id}"}]}
    return {**row, "input": input, "output": text, "tool_calls": [], **more}


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        daemon.on("POST /v1/feedback", Answer({"id": "f1", "created": True, "example_id": "e", "task": "t"}, 201))
        daemon.on("POST /admin/forget", Answer({"feedback": 1}))
        yield daemon


def queue(daemon: ScriptedDaemon, *answers: dict[str, Any]) -> None:
    daemon.on("GET /admin/inferences", Answer({"inferences": list(answers)}), Answer({"inferences": []}))


def given(daemon: ScriptedDaemon) -> list[tuple[str, str, Any]]:
    bodies = [request.json for request in daemon.asked_for("POST /v1/feedback")]
    return [(body["inference_id"], body["kind"], body["value"]) for body in bodies]


def editor(folder: Path, script: str) -> str:
    path = folder / "editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_answers_are_judged_one_after_the_other(daemon: ScriptedDaemon) -> None:
    queue(daemon, answer("a", "yes"), answer("b", "no"), answer("c", "positive", task="sentiment"), answer("d", "x"))
    talk = [(ASKED, "r"), (ASKED, "w"), (ASKED, "2"), (ASKED, "s")]
    code, screen = daemon.on_terminal("review", talk=talk)
    assert code == 0
    assert given(daemon) == [("a", "boolean", True), ("b", "boolean", False), ("c", "label", "negative")]
    assert "question c" in screen
    assert "[1] positive  [2] negative" in screen
    assert "3 judged, 1 skipped" in screen
    assert daemon.asked_for("GET /admin/inferences")[0].query["judged"] == "false"


def test_undo_goes_back_to_the_answer(daemon: ScriptedDaemon) -> None:
    queue(daemon, answer("a", "yes"), answer("b", "no"))
    talk = [(ASKED, "u"), ("nothing to undo", "r"), (ASKED, "u"), ("taken back", ""), (ASKED, "w"), (ASKED, "q")]
    code, _screen = daemon.on_terminal("review", talk=talk)
    assert code == 0
    assert given(daemon) == [("a", "boolean", True), ("a", "boolean", False)]
    (forgotten,) = daemon.asked_for("POST /admin/forget")
    assert forgotten.json == {"feedback": ["f1"], "keep_inferences": True}


def test_a_text_is_corrected_in_the_editor(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    queue(daemon, answer("a", "wrong"))
    script = editor(tmp_path, f'cp "$1" {tmp_path}/seen; printf "right\\n" > "$1"')
    daemon.on_terminal("review", talk=[(ASKED, "e")], EDITOR=script)
    assert given(daemon) == [("a", "demonstration", "right")]
    assert (tmp_path / "seen").read_text() == "wrong\n"


def test_calls_are_corrected_as_json_and_what_is_none_is_no_answer(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    queue(
        daemon,
        answer("a", "", tool_calls=[CALL], input={"messages": [{"role": "user", "content": "q"}], "tools": TOOLS}),
    )
    once = f'touch {tmp_path}/broken; echo "{{" > "$1"'
    script = f'if [ -e {tmp_path}/broken ]; then sed -i s/true/false/ "$1"; else {once}; fi'
    _code, screen = daemon.on_terminal(
        "review", talk=[(ASKED, "e"), ("not valid JSON", "e")], EDITOR=editor(tmp_path, script), VISUAL=""
    )
    ((id, kind, value),) = given(daemon)
    assert (id, kind) == ("a", "demonstration")
    assert json.loads(value["tool_calls"][0]["function"]["arguments"]) == {"on": False}
    assert 'lights({"on": true})' in screen


def test_what_was_not_changed_is_not_sent(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    queue(daemon, answer("a", "as it was"))
    code, _ = daemon.on_terminal("review", talk=[(ASKED, "e"), ("nothing was changed", "q")], EDITOR="true")
    assert code == 0
    assert given(daemon) == []
    queue(daemon, answer("a", "as it was"))
    talk = [(ASKED, "e"), ("no-such-editor does not start", "q")]
    assert daemon.on_terminal("review", talk=talk, EDITOR="no-such-editor", VISUAL="")[0] == 0


def test_a_refusal_leaves_the_answer_to_be_judged(daemon: ScriptedDaemon) -> None:
    queue(daemon, answer("a", "yes"))
    daemon.refuse("POST /v1/feedback", 400, "the value is wrong", "invalid_request")
    _, screen = daemon.on_terminal("review", talk=[(ASKED, "r"), ("not taken: the value is wrong", "q")])
    assert "0 judged" in screen


def test_escape_sequences_of_an_answer_do_not_reach_the_terminal(daemon: ScriptedDaemon) -> None:
    queue(daemon, answer("a", "evil \x1b]0;owned\x07 text", task="\x1b[2Jtask"))
    _, screen = daemon.on_terminal("review", talk=[(ASKED, "q")])
    assert "\x1b]0;" not in screen
    assert "\x1b[2J" not in screen


def test_nothing_to_review_is_said(daemon: ScriptedDaemon) -> None:
    queue(daemon)
    code, screen = daemon.on_terminal("review")
    assert code == 0
    assert "every answer has been judged" in screen


def test_a_pipe_is_told_what_to_use_instead(daemon: ScriptedDaemon) -> None:
    result = daemon.run("review")
    assert result.returncode == 2
    assert "agentctl feedback add" in result.stderr
    assert os.linesep not in result.stderr.strip()
