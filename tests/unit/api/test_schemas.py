"""What clients send besides what they mean: nulls, others' fields, and what agentd itself answered."""

import json
from typing import Any

import pytest

from agentd.api.messages import plain
from agentd.api.requests import validate
from agentd.api.schemas import ChatCompletion, TextCompletion
from agentd.errors import InvalidRequest

HI = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
CALLED = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
DONE = {"role": "function", "name": "f", "content": "ok"}


def chat(*messages: dict[str, Any], **fields: Any) -> ChatCompletion:
    return validate(json.dumps({"messages": list(messages) or [HI], **fields}).encode(), ChatCompletion)


def text(**fields: Any) -> TextCompletion:
    return validate(json.dumps(fields).encode(), TextCompletion)


@pytest.mark.parametrize("field", sorted(ChatCompletion.model_fields.keys() - {"messages"}))
def test_a_null_is_no_field_at_all(field: str) -> None:
    body = chat(**{field: None})
    assert getattr(body, field) == getattr(chat(), field)
    assert body.ignored() == [field]
    assert body.unknown() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"refusal": None},
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
    ],
)
def test_an_answers_own_fields_are_taken_back(fields: dict[str, Any]) -> None:
    body = chat(HI, {"role": "assistant", "content": "yes", **fields}, HI)
    assert plain(body.messages)[1] == {"role": "assistant", "content": "yes"}
    assert {name.removeprefix("messages.") for name in body.ignored()} == fields.keys()
    assert body.unknown() == []


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_taken_back(name: str) -> None:
    body = chat(HI, {"role": "assistant", "content": "yes", name: "hm"}, {**HI, name: "hm"})
    assert plain(body.messages)[1:] == [{"role": "assistant", "content": "yes", "reasoning_content": "hm"}, HI]
    assert body.ignored() == []


@pytest.mark.parametrize("top_p", [0, 0.5, 1])
def test_the_whole_range_of_openai_is_taken(top_p: float) -> None:
    assert chat(top_p=top_p).top_p == top_p  # 0: the likeliest token, which samplers keep whatever they cut


F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
G = {"type": "function", "function": {"name": "g", "description": "does g", "strict": True}}
NAMED = {"type": "function", "function": {"name": "f"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}


@pytest.mark.parametrize("choice", ["none", "auto", "required", NAMED, ALLOWED])
def test_the_input_has_what_was_said_about_tools(choice: Any) -> None:
    body = chat(tools=[F, G], tool_choice=choice, parallel_tool_calls=False, reasoning_effort="none")
    assert body.input() == {
        "messages": [HI],
        "tools": [F, G],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"reasoning_effort": "none", "enable_thinking": False},
    }
    assert body.ignored() == []
    assert chat(tools=None, tool_choice=None, parallel_tool_calls=None).input() == {"messages": [HI]}
    assert chat(tools=[], tool_choice="auto").input() == {"messages": [HI]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [F, F]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "none"}}]}, "tools"),
        ({"tools": [G], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [G], "tool_choice": ALLOWED}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [F]}, "tool_choice"),
        ({"tools": [F], "grammar": 'root ::= "a"'}, "tools"),
        ({"functions": [F["function"]], "tools": [F]}, "functions"),
        ({"functions": [F["function"]] * 2}, "functions"),
        ({"functions": [F["function"]], "function_call": {"name": "g"}}, "functions"),
        ({"function_call": {"name": "f"}}, "functions"),
        ({"functions": [F["function"]], "function_call": "required"}, "function_call"),
        ({"functions": [F["function"]], "grammar": 'root ::= "a"'}, "tools"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": [HI, {"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "tool", "tool_call_id": "c1", "content": "x"},
                    {"role": "assistant", "tool_calls": [CALL]},
                ]
            },
            "messages",
        ),
    ],
)
def test_what_is_wrong_about_tools_is_said(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        chat(*fields.pop("messages", [HI]), **fields).input()
    assert error.value.param == param


def test_calls_and_results_are_passed_on() -> None:
    body = chat(HI, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "ok"})  # fmt: skip
    assert plain(body.messages)[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "ok", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([CALLS, RESULT, RESULT], "messages.2.tool_call_id: 'c1' has a result already"),
        ([CALLS, {**RESULT, "tool_call_id": "c2"}], "messages.1.tool_call_id: 'c2' names no call"),
        ([CALLED, DONE, DONE], "messages.2.name: 'f' has a result already"),
        ([CALLED, {**DONE, "name": "g"}], "messages.1.name: 'g' was not called"),
        ([CALLED, {**DONE, "name": None}], "messages.1: name says which function"),
        ([{**CALLS, "function_call": CALL["function"]}], "exclude each other"),
        ([{**HI, "function_call": CALL["function"]}], "function_call goes with role assistant"),
    ],
)
def test_a_result_is_of_one_call(messages: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what) as error:
        chat(*messages).input()
    assert error.value.param == "messages"


def test_clients_may_begin_anew_with_ids_in_every_message() -> None:
    messages: list[dict[str, Any]] = [
        HI,
        CALLS,
        RESULT,
        CALLS,
        RESULT,
        {**CALLS, "tool_calls": [CALL, CALL]},
        RESULT,
        RESULT,
    ]
    assert len(plain(chat(*messages).messages)) == 8


@pytest.mark.parametrize(("choice", "is_called"), [(None, None), ("none", "none"), ({"name": "f"}, NAMED)])
def test_functions_are_what_tools_were_before(choice: Any, is_called: Any) -> None:
    """As older agents still send them: one call an answer, and its result by the function's name."""
    body = chat(HI, CALLED, DONE, CALLED, DONE, functions=[F["function"]], function_call=choice)
    calls = [{**CALL, "id": f"call_{number}"} for number in (1, 3)]
    results = [{"role": "tool", "content": "ok", "tool_call_id": call["id"]} for call in calls]
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    assert body.input() == {
        "messages": [HI, turns[0], results[0], turns[1], results[1]],
        "tools": [F],
        "parallel_tool_calls": False,
        **({"tool_choice": is_called} if is_called else {}),
    }
    assert [name for name in body.ignored() if not name.startswith("messages.")] == (
        [] if choice else ["function_call"]
    )
    assert chat(functions=[], function_call="none").input() == {"messages": [HI]}


@pytest.mark.parametrize(
    ("field", "nothing", "something"),
    [
        ("modalities", ["text"], ["text", "audio"]),
        ("best_of", 1, 2),
        ("echo", False, True),
        ("suffix", "", "!"),
        ("mirostat", 0, 2),
    ],
)
def test_what_changes_the_answer_is_refused_unless_it_asks_for_nothing(
    field: str, nothing: Any, something: Any
) -> None:
    assert chat(**{field: nothing}).ignored() == [field]
    with pytest.raises(InvalidRequest, match=f"{field} is not supported") as error:
        chat(**{field: something})
    assert (error.value.status, error.value.code, error.value.param) == (400, "not_supported", field)


def test_unknown_fields_are_named_and_harmless_ones_told_apart() -> None:
    body = chat({**HI, "colour": "red"}, temprature=1, service_tier="auto", stream_options={"include": True})
    assert set(body.ignored()) == {"temprature", "service_tier", "messages.colour", "stream_options.include"}
    assert set(body.unknown()) == {"temprature", "messages.colour", "stream_options.include"}


def test_a_null_inside_a_schema_is_part_of_it() -> None:
    schema = {"enum": ["a", None], "default": None}
    form = chat(response_format={"type": "json_schema", "json_schema": {"schema": schema, "strict": None}})
    assert form.response_format is not None
    assert form.response_format.json_schema is not None
    assert form.response_format.json_schema.schema_ == schema


def test_parts_of_a_text_are_lines_of_it() -> None:
    parts = [{"type": "text", "text": "Translate:"}, {"type": "text", "text": "Good morning."}]
    assert plain(chat({"role": "user", "content": parts}).messages)[0]["content"] == "Translate:\nGood morning."


def test_a_prompt_is_a_text_a_list_of_one_or_tokens() -> None:
    assert text(prompt="a").input() == text(prompt=["a"]).input() == {"prompt": "a"}
    assert text(prompt=[1, 2]).input() == {"prompt": [1, 2]}
    assert text(prompt="<s>", special=True).input() == {"prompt": "<s>", "special": True}
    for wrong in ([], ["a", 1], [[1]], 7, [True], [-1]):
        with pytest.raises(InvalidRequest) as error:
            text(prompt=wrong)
        assert error.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="send a request for each"):
        text(prompt=["a", "b"]).input()


def test_the_schema_says_that_fields_may_be_null() -> None:
    properties = ChatCompletion.model_json_schema()["properties"]
    assert {"type": "null"} in properties["stream"]["anyOf"]
    assert {"type": "null"} in properties["max_tokens"]["anyOf"]
    assert "anyOf" not in properties["messages"]
