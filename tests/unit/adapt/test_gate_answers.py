"""What the gate asks, and what it makes of the answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentd.adapt.gate.answers import GateAnswers
from agentd.adapt.gate.gate import Outcome, judge
from agentd.adapt.planning import small_talk
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.config.schema import GateSettings
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
    assert len(talk) > 100
    assert all(line.input["tools"] == TOOLS and line.input["messages"][0] == SYSTEM for line in talk)
    answer_all(answers, SPOKE, CALLED)
    no_call = answers.no_calls()["home"]
    assert (no_call.source, no_call.rise) == ("small talk", len(talk))
    assert len(no_call.named) == 10
    assert set(no_call.named) <= set(small_talk.texts(small_talk.JUDGED)), "only our own words"


def test_its_own_messages_without_calls_are_asked_too(tmp_path: Path) -> None:
    calls = [member(i, "message", MESSAGE, tools=TOOLS) for i in range(20)]
    talk = [member(i, "demonstration", "Hi!", tools=TOOLS) for i in range(20, 32)]
    answers = gate_answers([*calls, *talk], tmp_path)
    n = 12 + sum(line.member is None for line in answers.lines)
    answer_all(answers, SPOKE, CALLED)
    no_call = answers.no_calls()["home"]
    assert (no_call.source, len(no_call.before), no_call.rise) == ("holdout and small talk", n, n)


def test_who_never_calls_is_asked_no_small_talk_beside_enough_of_its_own(tmp_path: Path) -> None:
    answers = gate_answers([member(i, "demonstration", "Hi!", tools=TOOLS) for i in range(12)], tmp_path)
    assert len(answers.lines) == 12
    answer_all(answers, SPOKE, CALLED)
    assert answers.no_calls()["home"].source == "holdout"


def test_an_answer_ends_where_no_more_of_it_counts(tmp_path: Path) -> None:
    talker = json.dumps({**json.loads(MESSAGE), "content": "I will see to that at once. " * 10})
    for target, least in ((MESSAGE, 8), (talker, 120)):
        members = [member(0, "message", target, tools=TOOLS), member(1, "demonstration", "Hi!", tools=TOOLS)]
        enough = [line.as_json()["enough"] for line in gate_answers(members, tmp_path).lines]
        assert all(each["text"] >= least for each in enough)
        assert sum("call" not in each for each in enough) == 1, "a call where one is right is read to its end"


def test_texts_that_are_compared_are_read_to_their_end(tmp_path: Path) -> None:
    (line,) = gate_answers([member(0, "demonstration", "Hi!", metric="exact")], tmp_path).lines
    assert "enough" not in line.as_json()


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


PAIR = json.dumps({"chosen": "Which room?", "rejected": "No."})
THUMB = json.dumps({"answer": "Done.", "good": True})


def lost(outcome: Outcome) -> Outcome:
    """The same with calls that are wrong."""
    return replace(outcome, hits=[False, False, *outcome.hits[2:]])


def test_pairs_beside_calls_are_won_or_lost_as_they_are_alone(tmp_path: Path) -> None:
    calls = [member(i, "message", MESSAGE, tools=TOOLS, tool_choice="required") for i in range(2)]
    pairs = [member(i, "preference", PAIR, tools=TOOLS) for i in range(2, 12)]
    thumb = member(12, "thumb", THUMB, tools=TOOLS)
    answers = gate_answers([*calls, *pairs, thumb], tmp_path)
    answer_all(answers, SPOKE, CALLED)
    found = []
    for won, candidate in ((False, False), (True, True)):
        outcome = {"home": Outcome([1.0] * 13, [None, None, *[won] * 10, None])}
        found.append(answers.judged(outcome, [*calls, *pairs, thumb], candidate=candidate)["home"])
    assert [each.known for each in found] == [[False] * 12, [True] * 12]
    assert found[1].shares == [1.0, 1.0, *[None] * 11]
    accepted = [
        judge({"home": old}, {"home": new}, adapted={"home"}, drift=0.0, gate=GateSettings(), seed=0).accepted
        for old, new in (
            (found[0], found[1]),
            (replace(found[0], hits=[True, True, *found[0].hits[2:]]), lost(found[1])),
        )
    ]
    assert accepted == [True, False]


def test_where_nothing_is_right_or_wrong_the_loss_decides_alone(tmp_path: Path) -> None:
    thumbs = [member(i, "thumb", THUMB, metric="exact") for i in range(40)]
    answers = gate_answers(thumbs, tmp_path)
    assert answers.lines == []
    losses = ([1.0] * 40, [0.5] * 40)
    before, after = (
        answers.judged({"home": Outcome(each, [])}, thumbs, candidate=which)
        for which, each in zip((False, True), losses, strict=True)
    )
    assert judge(before, after, adapted={"home"}, drift=0.0, gate=GateSettings(), seed=0).accepted


def test_ten_answers_are_shown_those_that_changed_first(tmp_path: Path) -> None:
    members = [member(i, "message", MESSAGE, tools=TOOLS, tool_choice="required") for i in range(40)]
    answers = gate_answers(members, tmp_path)
    answer_all(answers, SPOKE, SPOKE)
    answers.after[7] = CALLED
    shown = answers.samples()["home"]
    assert len(shown) == 10
    assert shown[0]["before"] == "Hello!"
    assert shown[0]["after"] == shown[0]["right"] == 'on({"room": "hall"})'
    assert (shown[0]["before_right"], shown[0]["after_right"]) == (False, True)
    assert shown[0]["input"] == f"say {shown[0]['example'][1:]}"
    assert not any(entry["after_right"] for entry in shown[1:])


def test_a_task_whose_holdout_cannot_be_used_shows_nothing(tmp_path: Path) -> None:
    learned = replace(member(0, "message", MESSAGE, task="garden", tools=TOOLS), role="train")
    answers = gate_answers([learned, member(1, "message", MESSAGE, tools=TOOLS, tool_choice="required")], tmp_path)
    answer_all(answers, SPOKE, CALLED)
    assert answers.samples().keys() == {"home"}
