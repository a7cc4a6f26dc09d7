"""Formats of calls read off templates with habits of their own, written for these tests."""

import json
from typing import Any

import pytest

from agentd.engine.calls.derive import derive
from agentd.engine.calls.probes import NotDerivable
from agentd.engine.calls.reader import AnswerReader
from agentd.engine.calls.rendering import Conversation
from agentd.engine.chat_template import ChatTemplate

ARGUMENTS = {"room": 'the "blue" one', "level": 3}
TOOLS = [{"type": "function", "function": {"name": "dim", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "dim", "arguments": json.dumps(ARGUMENTS)}}
USER = {"role": "user", "content": "Dim it."}

ONLY_WITHOUT_CONTENT = """{% for m in messages %}<|{{ m.role }}|>
{%- if m.role == 'assistant' and m.content is none %}
{%- for c in m.tool_calls %}<call>{"name": "{{ c.function.name }}",{{ " " -}}
 "arguments": {{ c.function.arguments | tojson }}}</call>
{%- endfor %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

BLANKS_IN_THE_HISTORY = """{% for m in messages %}  <|{{ m.role }}|>  {% if m.tool_calls %}
{%- for c in m.tool_calls %} <call>{"name": "{{ c.function.name }}",{{ " " -}}
 "arguments": {{ c.function.arguments | tojson }}}</call>
{%- endfor %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

ARGUMENTS_AS_THEY_COME = """{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}
{%- for c in m.tool_calls %}<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}</call>
{%- endfor %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

TEXT_BETWEEN_MARKS = """{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}<|start|>{{ m.content }}<|stop|>
{%- for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
{%- endfor %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

TEMPLATES = {
    "only without content": ONLY_WITHOUT_CONTENT,
    "blanks in the history": BLANKS_IN_THE_HISTORY,
    "arguments as they come": ARGUMENTS_AS_THEY_COME,
    "text between marks": TEXT_BETWEEN_MARKS,
}


def conversation(source: str) -> Conversation:
    return Conversation(ChatTemplate(source, "<s>", "<|end|>"), lambda: ["<|end|>"])


def read(source: str, text: str) -> tuple[str, list[tuple[str | None, str]]]:
    """(text, calls) of an answer."""
    reader = AnswerReader(conversation(source).form, {"dim": {"type": "object"}})
    parts = [reader.feed(text), reader.flush()]
    calls: list[tuple[str | None, str]] = []
    for call in (call for part in parts for call in part.calls):
        if call.name is not None:
            calls.append((call.name, ""))
        calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    return "".join(part.text for part in parts).strip(), calls


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_calls_are_derived_rendered_and_read_back(source: str, content: str | None) -> None:
    room = conversation(source)
    assert room.form.calls.origin == "derived"
    message = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    history = room.render({"messages": [USER, message], "tools": TOOLS}, generate=False)
    assert json.dumps(ARGUMENTS) in history
    answer = room.answer({"messages": [USER], "tools": TOOLS}, message)
    text, calls = read(source, answer)
    assert text == ""
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("dim", ARGUMENTS)]


def test_marks_around_text_in_front_of_calls_are_not_said() -> None:
    message = {"role": "assistant", "content": "At once.", "tool_calls": [CALL]}
    answer = conversation(TEXT_BETWEEN_MARKS).answer({"messages": [USER], "tools": TOOLS}, message)
    assert "<|start|>At once.<|stop|>" in answer
    text, calls = read(TEXT_BETWEEN_MARKS, answer)
    assert text == "At once."
    assert [name for name, _ in calls] == ["dim"]


def test_the_reason_names_what_the_template_does_not_show() -> None:
    last_call_closes = ONLY_WITHOUT_CONTENT.replace("</call>", "</call>{% if not loop.first %}</calls>{% endif %}")
    with pytest.raises(NotDerivable, match="calls differ from one to the next"):
        derive(ChatTemplate(last_call_closes, "<s>", "<|end|>"))


COUNTED = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}<|calls|>
{{- m.tool_calls | length }}:
{%- for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }};{% endfor %}
{%- endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

LINES = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<act>
tool: {{ c.function.name }}
{% for k, v in c.function.arguments.items() %}{{ k }}: {{ v | tojson }}
{% endfor %}</act>{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize("source", [COUNTED, LINES])
def test_calls_that_would_not_be_read_back_get_the_generic_format(source: str) -> None:
    """The number of calls in front, or names without quotes: what the probes show is not all that there is."""
    shown = conversation(source)
    assert shown.form.calls.origin == "generic"
    assert shown.why_generic == "the calls that it renders are not read back"
    assert "dim" in shown.render({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]})


TAGS = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}
{{- '<invoke name="' ~ c.function.name ~ '">' }}
{%- for k, v in c.function.arguments.items() %}<p n="{{ k }}">{{ v if v is string else v | tojson }}</p>{% endfor %}
{{- '</invoke>' }}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"$ref": "#/$defs/code"}, "46", "46"),
        ({"allOf": [{"$ref": "#/$defs/code"}], "default": "x"}, "true", "true"),
        ({"anyOf": [{"$ref": "#/$defs/code"}, {"type": "boolean"}]}, "46", "46"),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 9}]}, "46", "46"),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 9}]}, "4", 4),
        ({"type": ["string", "integer"], "enum": ["1", 2]}, "1", "1"),
        ({"type": ["string", "integer"], "enum": ["1", 2]}, "2", 2),
        ({"$ref": "#/$defs/code~1x"}, "7", 7),
        ({"$ref": "#"}, '{"a": 1}', {"a": 1}),
        ({"$ref": "#/nowhere"}, "7", 7),
    ],
)
def test_a_value_is_read_as_what_its_schema_allows(schema: dict[str, Any], written: str, value: Any) -> None:
    """Through references and parts: a text of digits is no number where numbers may not stand."""
    definitions = {"code": {"type": "string"}, "code/x": {"type": "integer"}}
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": definitions}
    reader = AnswerReader(conversation(TAGS).form, {"dim": parameters})
    parts = [reader.feed(f'<invoke name="dim"><p n="a">{written}</p></invoke>'), reader.flush()]
    assert json.loads("".join(call.arguments for part in parts for call in part.calls)) == {"a": value}
