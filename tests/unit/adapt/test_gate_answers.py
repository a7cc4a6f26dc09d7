"""What the gate asks, and what it makes of the answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentd.adapt.gate.answers import GateAnswers, small_talk
from agentd.adapt.gate.gate import Outcome
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.engine.operations import Answered
from agentd.store.examples import Example
from agentd.store.tasks import Task

TOOLS = [{"type": "function", "function": {"name": "on", "parameters": {}}}]
CALL = {"id": "c", "type": "function", "function": {"name": "on", "arguments": '{"room": "hall"}'}}
MESSAGE = json.dumps({"role": "assistant", "content": "", "tool_calls": [CALL]})
SYSTEM = {"role": "system", "content": "You run a home."}


def member(number: int, kind: str, target: str, task: str = "home", metric: str = "auto", **input: Any) -> Member:
    said = {"messages": [SYSTEM, {"role": "user", "content": f"say {number}"}], **input}
    example = Example(f"e{number}", task, kind, said, target, "holdout", "new", None, "", "", "")
    return Member(number, example, "holdout", Task(task, [], False, metric, None, "feedback", ""))


def gate_answers(members: list[Member], tmp_path: Path) -> GateAnswers:
    return GateAnswers.of(Dataset(members, {}), tmp_path / "asked.jsonl", 0)


def answer_all(answers: GateAnswers, before: Answered, after: Answered) -> None:
    answers.before = dict.fromkeys(range(len(answers.lines)), before)
    answers.after = dict.fromkeys(range(len(answers.lines)), after)


CALLED, SPOKE = Answered("", [CALL]), Answered("Hello!", [])


def test_a_task_of_calls_alone_is_asked_small_talk_with_its_tools(tmp_path: Path) -> None:
    answers = gate_answers([member(i, "message", MESSAGE, tools=TOOLS) for i in range(30)], tmp_path)
    talk = [line for line in answers.lines if line.member is None]
    assert len(answers.lines) == 30 + len(talk)
    assert {line.input["messages"][-1]["content"] for line in talk} == set(small_talk())
    assert all(line.input["tools"] == TOOLS and line.input["messages"][0] == SYSTEM for line in talk)
    answer_all(answers, SPOKE, CALLED)
    no_call = answers.no_calls()["home"]
    assert (no_call.source, no_call.rise) == ("small talk", len(talk))


def test_its_own_messages_without_calls_come_first(tmp_path: Path) -> None:
    calls = [member(i, "message", MESSAGE, tools=TOOLS) for i in range(20)]
    talk = [member(i, "demonstration", "Hi!", tools=TOOLS) for i in range(20, 32)]
    answers = gate_answers([*calls, *talk], tmp_path)
    assert len(answers.lines) == 32
    answer_all(answers, SPOKE, CALLED)
    no_call = answers.no_calls()["home"]
    assert (no_call.source, len(no_call.before), no_call.rise) == ("holdout", 12, 12)


@pytest.mark.parametrize("choice", ["required", "none"])
def test_nothing_is_asked_where_calling_is_no_choice(tmp_path: Path, choice: str) -> None:
    answers = gate_answers([member(i, "message", MESSAGE, tools=TOOLS, tool_choice=choice) for i in range(8)], tmp_path)
    assert len(answers.lines) == 8
    answer_all(answers, SPOKE, SPOKE)
    assert answers.no_calls() == {}


def test_text_without_tools_is_not_generated_unless_it_is_to_be_exact(tmp_path: Path) -> None:
    assert gate_answers([member(i, "demonstration", "A text.") for i in range(8)], tmp_path).lines == []
    assert (
        len(gate_answers([member(i, "demonstration", "A text.", metric="exact") for i in range(8)], tmp_path).lines)
        == 8
    )


def test_what_one_of_them_did_not_answer_is_not_judged(tmp_path: Path) -> None:
    members = [member(i, "message", MESSAGE, tools=TOOLS, tool_choice="required") for i in range(6)]
    answers = gate_answers(members, tmp_path)
    answer_all(answers, SPOKE, CALLED)
    del answers.after[0]
    losses = {"home": Outcome([1.0] * 6, [])}
    before, after = (answers.judged(losses, members, candidate=which)["home"] for which in (False, True))
    assert (sum(hit is None for hit in before.hits), before.known, after.known) == (1, [False] * 5, [True] * 5)
    assert (before.metric, before.accuracy, after.accuracy) == ("call", 0.0, 1.0)


def test_ten_answers_are_shown_those_that_changed_first(tmp_path: Path) -> None:
    members = [member(i, "message", MESSAGE, tools=TOOLS, tool_choice="required") for i in range(40)]
    answers = gate_answers(members, tmp_path)
    answer_all(answers, SPOKE, SPOKE)
    answers.after[7] = CALLED
    entries = answers.samples()["home"]
    assert len(entries) == 10
    assert entries[0]["before"] == "Hello!"
    assert entries[0]["after"] == entries[0]["right"] == 'on({"room": "hall"})'
    assert (entries[0]["before_right"], entries[0]["after_right"]) == (False, True)
    assert entries[0]["input"] == f"say {entries[0]['example'][1:]}"
    assert not any(entry["after_right"] for entry in entries[1:])
