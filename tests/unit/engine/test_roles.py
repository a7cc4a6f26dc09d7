"""Conversations in templates that refuse or lose a part of them, written for these tests: nothing that is said may be
missing, and a request that other servers answer is no error."""

import itertools
from typing import Any

import pytest

from agentd.engine.calls.rendering import Conversation
from agentd.engine.chat_template import ChatTemplate, TemplateRefusal

_REST = "{% if add_generation_prompt %}<bot>{% endif %}"
_TURN = "<{{ 'bot' if m.role == 'assistant' else m.role }}>{{ m.content | trim }}</>"
_IN_TURNS = (
    """{% for m in t %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('users and assistants take turns') }}{% endif %}"""
    + _TURN
    + "{% endfor %}"
    + _REST
)
_CALLS = """{% for c in m.tool_calls or [] %}{{ '<call>{"name": "' ~ c.function.name ~ '", "arguments": ' }}
{{- c.function.arguments | tojson }}}</call>{% endfor %}"""

DIALECTS = {
    "refuses the system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% set t = messages %}" + _IN_TURNS,
    "loses the system": "{% for m in messages if m.role in ('user', 'assistant') %}" + _TURN + "{% endfor %}" + _REST,
    "one system first, and turns": """{% set t = messages %}{% if t[0].role == 'system' %}(({{ t[0].content }}))
{%- set t = t[1:] %}{% endif %}"""
    + _IN_TURNS,
    "one system first": """{% for m in messages %}{% if m.role == 'system' and not loop.first %}
{{- raise_exception('the system speaks first') }}{% endif %}"""
    + _TURN
    + "{% endfor %}"
    + _REST,
    "shows the first system, and no other": """{% if messages[0].role == 'system' %}(({{ messages[0].content }}))
{%- endif %}{% for m in messages if m.role != 'system' %}"""
    + _TURN
    + "{% endfor %}"
    + _REST,
    "shows the last system, and no other": """{% for m in messages if m.role == 'system' and loop.last %}
(({{ m.content }})){% endfor %}{% for m in messages if m.role != 'system' %}"""
    + _TURN
    + "{% endfor %}"
    + _REST,
    "puts the system in front of the last user": """{% for m in messages if m.role != 'system' %}
{%- if loop.last and m.role == 'user' and messages[0].role == 'system' %}(({{ messages[0].content }})){% endif %}"""
    + _TURN
    + "{% endfor %}"
    + _REST,
    "was made for tools": "{% for t in tools %}{{ t.function.name }}{% endfor %}{{ functions | length }}"
    "{% for m in messages %}" + _TURN + "{% endfor %}" + _REST,
    "wants a question": """{% if not messages | selectattr('role', 'equalto', 'user') | list %}
{{- raise_exception('no user asks') }}{% endif %}{% for m in messages %}"""
    + _TURN
    + "{% endfor %}"
    + _REST,
    "wants the user to speak last": """{% if messages[-1].role != 'user' and add_generation_prompt %}
{{- raise_exception('the last is no user') }}{% endif %}{% for m in messages %}"""
    + _TURN
    + "{% endfor %}"
    + _REST,
    "shows all": "{% for m in messages %}" + _TURN + "{% endfor %}" + _REST,
    "knows no results": "{% for m in messages %}{% if m.role in ('tool', 'system') %}{{ raise_exception(m.role) }}"
    "{% endif %}" + _TURN.replace("</>", _CALLS + "</>") + "{% endfor %}" + _REST,
    "takes turns but for calls and results": """{% set n = namespace(i=0) %}{% for m in messages %}
{%- if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}{% if (m.role == 'user') != (n.i % 2 == 0) %}
{{- raise_exception('out of turn') }}{% endif %}{% if not m.content %}{{ raise_exception('nothing said') }}{% endif %}
{%- set n.i = n.i + 1 %}{% elif m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"""
    + _TURN.replace("</>", _CALLS + "</>")
    + "{% endfor %}"
    + _REST,
    "looks for results right behind calls": """{% for m in messages if m.role != 'tool' %}"""
    + _TURN.replace("</>", _CALLS + "</>")
    + """{% if m.tool_calls %}{% for r in messages[messages.index(m) + 1:] %}{% if r.role != 'tool' %}{% break %}
{%- endif %}{{ r.content }}{% endfor %}{% endif %}{% endfor %}"""
    + _REST,
    "loses results": "{% for m in messages if m.role != 'tool' %}"
    + _TURN.replace("</>", _CALLS + "</>")
    + "{% endfor %}"
    + _REST,
}
SHAPES = ["s", "su", "ssu", "suau", "usu", "us", "uasu", "suasuasu", "uu", "suuau", "uaau", "suaauu", "sau", "uasau"]
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "dim", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {"id": "abcdefgh1", "type": "function", "function": {"name": "dim", "arguments": "{}"}}


def conversation(source: str) -> Conversation:
    return Conversation(ChatTemplate(source, "<s>", "</>"), lambda: ["</>"])


def said(shape: str) -> list[dict[str, Any]]:
    return [{"role": _ROLES[who], "content": f"what {number} says"} for number, who in enumerate(shape)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_all_that_is_said_is_shown_once_and_in_its_order(dialect: str, shape: str) -> None:
    room, messages = conversation(DIALECTS[dialect]), said(shape)
    tools = [{}, {"tools": [TOOL]}] if messages[0]["role"] == "system" else [{}]
    for about in tools:
        text = room.render({"messages": messages, **about})
        assert text.endswith("<bot>")
        assert [text.count(message["content"]) for message in messages] == [1] * len(messages)
        places = [text.index(message["content"]) for message in messages]
        assert places == sorted(places)
        assert not about or "dim" in text or room.form.calls.origin != "generic"


def test_what_a_template_shows_by_itself_is_left_as_it_is() -> None:
    shape = "ssusuuaas"
    turns = [f"<{'bot' if who == 'a' else _ROLES[who]}>what {i} says</>" for i, who in enumerate(shape)]
    assert conversation(DIALECTS["shows all"]).render({"messages": said(shape)}) == "".join(turns) + "<bot>"


def test_the_systems_text_stands_before_what_the_user_says_next() -> None:
    room = conversation(DIALECTS["refuses the system"])
    text = room.render({"messages": said("ssuasu")})
    first, last = "what 0 says\n\nwhat 1 says\n\nwhat 2 says", "what 4 says\n\nwhat 5 says"
    assert text == f"<user>{first}</><bot>what 3 says</><user>{last}</><bot>"
    assert room.render({"messages": said("uu")}) == "<user>what 0 says\nwhat 1 says</><bot>"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_conversation_that_grows_keeps_its_beginning(dialect: str) -> None:
    """What was computed of a prompt serves the next one, and what is trained on is what was served."""
    room, messages = conversation(DIALECTS[dialect]), said("ssuasuaua")
    for end in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        prompt, answer = room.render({"messages": messages[:end]}), messages[end]
        for about in ({}, {"tools": [TOOL]}):
            assert room.answer({"messages": messages[:end], **about}, answer) == answer["content"]
        assert room.render({"messages": messages}, generate=False).startswith(prompt + answer["content"])


RESULTS = [
    {"role": "user", "content": "Dim it."},
    {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "abcdefgh2"}]},
    {"role": "system", "content": "Be brief."},
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": "result one"},
    {"role": "tool", "tool_call_id": "abcdefgh2", "content": "result two"},
    {"role": "user", "content": "And now?"},
]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_results_that_a_template_does_not_know_are_said_by_the_user(dialect: str) -> None:
    room = conversation(DIALECTS[dialect])
    assert room.form.calls.origin == ("derived" if "results" in dialect else "generic")
    text = room.render({"messages": RESULTS, "tools": [TOOL]})
    for content in ("Dim it.", "Be brief.", "result one", "result two", "And now?"):
        assert text.count(content) == 1
    assert text.index("result one") < text.index("result two") < text.index("And now?")


def test_what_cannot_be_mended_is_refused_for_its_first_reason() -> None:
    room = conversation("{{ raise_exception('in ' ~ messages | length ~ ' messages') }}")
    with pytest.raises(TemplateRefusal, match="in 2 messages"):
        room.render({"messages": said("su")})


def test_a_template_that_shows_nothing_is_asked_as_ever() -> None:
    for roles in itertools.product("su", repeat=2):
        assert conversation("hello").render({"messages": said("".join(roles))}) == "hello"
