"""Messages that want no call: which, for whom, and what a pass learns of the model's answers to them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentd.adapt.planning import replay, small_talk
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.engine.operations import Answered
from agentd.store.examples import Example
from agentd.store.normalise import normal_text
from agentd.store.tasks import Task
from tools import home

TOOLS = [{"type": "function", "function": {"name": "on", "parameters": {}}}]
SYSTEM = {"role": "system", "content": "You run a home."}
CALL = {"id": "c", "type": "function", "function": {"name": "on", "arguments": "{}"}}
MESSAGE = json.dumps({"role": "assistant", "content": None, "tool_calls": [CALL]})
LEARNED, JUDGED = (small_talk.texts(package) for package in small_talk.PACKAGES)


def member(number: int, text: str, target: str = MESSAGE, kind: str = "message", **input: Any) -> Member:
    said = {"messages": [SYSTEM, {"role": "user", "content": text}], "tools": TOOLS, **input}
    example = Example(f"e{number}", "home", kind, said, target, "train", "new", None, "", "", "")
    return Member(number, example, "train", Task("home", [], False, "auto", None, "feedback", ""))


def commands(n: int) -> list[Member]:
    return [member(i, f"lamp {'attic' if i % 2 else 'cellar'} on {i}") for i in range(n)]


def said(inputs: list[dict[str, Any]]) -> list[str]:
    return [input["messages"][-1]["content"] for input in inputs]


def test_what_is_learned_what_is_judged_and_what_benchmarks_ask_are_different_texts() -> None:
    learned, judged = ({normal_text(line).strip(".!? ") for line in lines} for lines in (LEARNED, JUDGED))
    asked = {normal_text(row["text"]).strip(".!? ") for split in ("train", "heldout") for row in home.chat(split)}
    assert not learned & judged
    assert not (learned | judged) & asked
    assert len(judged) == len(JUDGED) > 100
    assert len(learned) == len(LEARNED) > 60


def test_words_of_the_commands_are_asked_about_other_ones_by_the_gate() -> None:
    learned = " ".join(said(small_talk.inputs(LEARNED, commands(8), part=1, rounds=3)))
    judged = " ".join(said(small_talk.inputs(JUDGED, commands(8), part=0, rounds=2)))
    words = {word for word in ("lamp", "attic", "cellar") if f'"{word}"' in learned}
    assert words
    assert {word for word in ("lamp", "attic", "cellar") if f'"{word}"' in judged} == {
        "lamp",
        "attic",
        "cellar",
    } - words
    assert "{}" not in learned + judged


def test_they_stand_behind_the_system_message_that_most_have_with_its_tools() -> None:
    other = [{"type": "function", "function": {"name": "off", "parameters": {}}}]
    members = [member(99, "lamp off", tools=other, response_format={"type": "text"}), *commands(3)]
    inputs = small_talk.inputs(JUDGED, members, part=0, rounds=1)
    assert all(input["messages"][0] == SYSTEM and input["tools"] == TOOLS for input in inputs)
    assert not any("response_format" in input for input in inputs)


@pytest.mark.parametrize("choice", ["required", "none", {"type": "function", "function": {"name": "on"}}])
def test_there_are_none_where_calling_is_no_choice(choice: Any) -> None:
    members = [member(i, f"lamp {i}", tool_choice=choice) for i in range(8)]
    assert small_talk.inputs(JUDGED, members, part=0, rounds=1) == []
    assert replay.questions(Dataset(members, {}), 0) == []


def test_there_are_none_where_small_talk_is_to_be_answered_by_a_call() -> None:
    for lines, part in ((JUDGED, 0), (LEARNED, 1)):
        assert small_talk.inputs(lines, [*commands(8), member(9, "hi there, lamp on")], part=part, rounds=1) != []
        assert small_talk.inputs(lines, [*commands(8), member(9, " hi ")], part=part, rounds=1) == []
        assert small_talk.inputs(lines, [*commands(8), member(9, "THANKS!")], part=part, rounds=1) == []


def test_one_is_asked_for_every_call_where_most_examples_call() -> None:
    quiet = [member(100 + i, f"who are you, {i}?", "Your home.", "demonstration") for i in range(30)]
    assert len(replay.questions(Dataset(commands(60), {}), 0)) == 60
    assert len(replay.questions(Dataset([*commands(60), *quiet], {}), 0)) == 60
    assert len(replay.questions(Dataset(commands(600), {}), 0)) == 64
    assert replay.questions(Dataset([*commands(20), *quiet], {}), 0) == []
    held_out = [replace(each, role="holdout") for each in commands(60)]
    assert len(replay.questions(Dataset([*held_out, member(0, "lamp on")], {}), 0)) == 1


def test_answers_in_words_are_learned_as_far_as_they_came(tmp_path: Path) -> None:
    asked = replay.questions(Dataset(commands(5), {}), 0)
    replay.write(asked, tmp_path / "asked.jsonl")
    assert len((tmp_path / "asked.jsonl").read_text().splitlines()) == len(asked) == 5
    answers = [
        Answered("", [CALL]),
        None,
        Answered("", [], "too long"),
        Answered("Hello!", []),
        Answered("It means that a pers", [], whole=False),
    ]
    whole, cut = replay.members(asked, answers, 40)
    assert [whole.number, cut.number] == [40, 41]
    assert whole.as_line()["target"] == {"role": "assistant", "content": "Hello!"}
    assert "whole" not in whole.as_line()
    assert cut.as_line()["target"]["content"] == "It means that a"
    assert cut.as_line()["whole"] is False
    assert cut.as_line()["input"] == asked[4].input
    assert {each.role for each in (whole, cut)} == {"replay"}
