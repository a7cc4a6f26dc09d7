import json
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tools import home

TRAIN, HELD_OUT = home.commands("train"), home.commands("heldout")
ROWS = [*TRAIN, *HELD_OUT]


def test_no_sentence_template_is_on_both_sides() -> None:
    assert not {row["template"] for row in TRAIN} & {row["template"] for row in HELD_OUT}
    assert len({row["text"] for row in ROWS}) == len(ROWS)


def test_there_is_enough_for_a_curve_and_a_judgement() -> None:
    assert len(TRAIN) >= 900
    assert 150 <= len(HELD_OUT) <= 200
    assert len(home.chat("train")) + len(home.chat("heldout")) >= 100


def test_every_held_out_intent_can_be_learned() -> None:
    names = {tool["function"]["name"] for tool in home.TOOLS}
    assert {row["name"] for row in HELD_OUT} == {row["name"] for row in TRAIN} == names


@pytest.mark.parametrize("n", [25, 100])
def test_the_first_rows_are_a_sample(n: int) -> None:
    """Every common function is among them, and none fills them."""
    counts = Counter(row["name"] for row in TRAIN[:n])
    assert {"HassTurnOn", "HassTurnOff", "HassLightSet", "HassStartTimer"} <= counts.keys()
    assert max(counts.values()) < 0.5 * n


def test_every_call_fits_the_schema_of_its_tool() -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in home.TOOLS}
    for row in ROWS:
        strict = {**schemas[row["name"]], "additionalProperties": False, "minProperties": 1}
        assert jsonschema_rs.is_valid(strict, row["arguments"]), row


def test_arguments_stand_in_the_order_of_the_schema() -> None:
    """In another, what is to be learned could not be answered under the constraint."""
    for row in ROWS:
        assert list(row["arguments"]) == list(home.order(row["name"], row["arguments"])), row


def test_what_is_said_is_in_the_call_and_nothing_else() -> None:
    """Names, rooms and digits of an argument are words of the command."""
    for row in ROWS:
        for key in ("name", "area", "color", "item"):
            assert row["arguments"].get(key, "") in row["text"], row


def test_talk_wants_no_call() -> None:
    train, held_out = home.chat("train"), home.chat("heldout")
    assert not {row["text"].lower() for row in train} & {row["text"].lower() for row in held_out}
    assert not {row["text"].lower() for row in (*train, *held_out)} & {row["text"] for row in ROWS}
    for row in (*train, *held_out):
        assert row.keys() == {"text", "answer", "split"}
        assert row["text"].strip() == row["text"] != ""
        assert row["answer"].strip() == row["answer"] != ""


def test_rows_become_examples() -> None:
    """A call in OpenAI's form, or words."""
    line = home.example(TRAIN[0])
    assert line["messages"][0] == {"role": "user", "content": TRAIN[0]["text"]}
    (call,) = line["messages"][-1]["tool_calls"]
    assert call["function"]["name"] == TRAIN[0]["name"]
    assert json.loads(call["function"]["arguments"]) == TRAIN[0]["arguments"]
    talk = home.chat("train")[0]
    assert home.example(talk)["messages"][-1] == {"role": "assistant", "content": talk["answer"]}


def test_the_licence_comes_with_the_data() -> None:
    notice = Path(home.COMMANDS).with_name("NOTICE").read_text()
    assert "The Home Assistant Authors" in notice
    assert "creativecommons.org/licenses/by/4.0/" in notice
    assert f"{len(ROWS):,} commands" in notice
    assert f"{len({row['template'] for row in ROWS})} of the sentence templates" in notice


def test_extraction_makes_the_same_file_again() -> None:
    """Where its packages are (they are not needed to use the data)."""
    pytest.importorskip("hassil")
    pytest.importorskip("home_assistant_intents")
    from tools import extract_home

    if any(metadata.version(name) != version for name, version in extract_home.VERSIONS.items()):
        pytest.skip("other versions")
    rows: list[dict[str, Any]] = extract_home.extract()
    assert rows == ROWS
