"""What is read off the chat templates of some seventy models renders, constrains and reads calls. Real templates, from
the sources of llama.cpp; a vocabulary of bytes and of the control tokens that a template writes."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import llguidance
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from agentd.engine.calls.answer_plan import AnswerPlan
from agentd.engine.calls.format import AnswerFormat
from agentd.engine.calls.piece_reader import PieceReader
from agentd.engine.calls.probes import NAMES, SAID, Turns, Variant
from agentd.engine.calls.reader import AnswerReader, Delta
from agentd.engine.calls.rendering import Conversation
from agentd.engine.calls.segments import common_end
from agentd.engine.chat_template import TemplateRefusal
from agentd.errors import InvalidRequest
from agentd.formats.tool_use import tool_use
from tools import templates

pytestmark = pytest.mark.slow

ENDS = ("<EOS>", "<|call|>", "<|calls|>", "<|eom_id|>", "<|eot_id|>", "<|return|>")
SCHEMA = {
    "type": "object",
    "properties": {
        "alpha": {"type": "string"},
        "beta": {"type": "integer"},
        "obj": {"type": "object"},
        "lst": {"type": "array"},
        "flag": {"type": "boolean"},
        "f": {"type": "number"},
    },
}
NOTHING: dict[str, Any] = {}
TEXT = {"alpha": "x"}
NASTY = {"alpha": 'it\'s "so" \\ \n<b> naïve 😀 {}', "beta": 7}
NESTED = {
    "alpha": "a",
    "obj": {"k": "v's", "l": [True, None, 2.5, {"z": "é\n"}]},
    "lst": [1, "two"],
    "flag": False,
    "f": -1.5e-3,
}
# Six of seventy have no form of calls of their own, and one has objects in XML's: they get the generic one.
GENERIC = {
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2-8B-A1B",
    "LFM2.5-Instruct",
    "MiniMax-M3",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "google-gemma-2-2b-it",
    "ibm-granite-granite-3.3-2B-Instruct",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}


@cache
def conversations() -> dict[str, Conversation]:
    paths = sorted(templates.fetch().glob("*.jinja"))
    return {path.stem: Conversation(templates.load(path), lambda: ENDS) for path in paths}


def own() -> Iterator[tuple[str, Conversation, AnswerFormat, Turns]]:
    """Those with a format of their own, and turns as it renders them."""
    for name, conversation in conversations().items():
        form = conversation.form
        if form.calls.origin != "generic":
            variant = Variant(form.calls.as_text, form.calls.ids)
            yield name, conversation, form, Turns(conversation.template, variant)


def rendered(form: AnswerFormat, turns: Turns, *arguments: dict[str, Any], content: str = "") -> str:
    """What an answer with these calls looks like, up to its end."""
    text = turns.answer(turns.calls(*arguments, content=content))
    text = text[: len(text) - len(common_end(text, turns.after))]
    return min((text.split(end)[0] for end in ENDS), key=len)


def answer(form: AnswerFormat, text: str, turns: Turns, cuts: Sequence[int] = ()) -> tuple[str, str, list[Any]]:
    """(text, reasoning, calls) as they are read in these pieces."""
    thinking = form.thinks(turns.prompt) and form.reasoning is not None and form.reasoning.closing in text
    reader = AnswerReader(form, dict.fromkeys(NAMES, SCHEMA), thinking=thinking)
    bounds = [0, *cuts, len(text)]
    return together([*(reader.feed(text[a:b]) for a, b in pairwise(bounds)), reader.flush()])


def together(parts: Sequence[Delta]) -> tuple[str, str, list[Any]]:
    """(text, reasoning, calls) of all that was read."""
    said = thought = ""
    calls: list[list[str]] = []
    for part in parts:
        said, thought = said + part.text, thought + part.reasoning
        for call in part.calls:
            if call.name is not None:
                assert call.index == len(calls)
                assert call.id
                calls.append([call.name, ""])
            calls[call.index][1] += call.arguments
    return said, thought, calls


def cases(form: AnswerFormat, turns: Turns) -> Iterator[tuple[list[dict[str, Any]], str]]:
    yield from (([each], "") for each in (NOTHING, TEXT, NASTY, NESTED))
    if form.calls.gap is not None:
        yield from (([NASTY, NESTED], ""), ([NOTHING, TEXT], ""), ([TEXT, NOTHING, NASTY], ""))
    if form.calls.later is not None:
        yield [NASTY], SAID


def test_nearly_every_template_shows_its_own_format() -> None:
    generic = {name for name, conversation in conversations().items() if conversation.form.calls.origin == "generic"}
    assert len(conversations()) >= 70
    assert generic <= GENERIC
    assert all(conversation.why_generic for name, conversation in conversations().items() if name in generic)


def test_calls_are_read_in_every_split() -> None:
    draw = random.Random(0)
    for name, _, form, turns in own():
        for arguments, content in cases(form, turns):
            text = rendered(form, turns, *arguments, content=content)
            whole = answer(form, text, turns)
            assert [(NAMES[i], each) for i, each in enumerate(arguments)] == [
                (called, json.loads(written)) for called, written in whole[2]
            ], (name, text)
            assert sorted({whole[0].strip(), whole[1].strip()}) == sorted({"", content}), (name, text)
            once = [(at,) for at in range(1, len(text)) if arguments == [NASTY]]
            several = [tuple(sorted(draw.sample(range(len(text)), min(5, len(text))))) for _ in range(10)]
            for cuts in [tuple(range(1, len(text))), *once, *several]:
                assert answer(form, text, turns, cuts) == whole, (name, text, cuts)


def test_an_answer_that_is_cut_anywhere_says_no_words_of_the_format() -> None:
    """As `max_tokens` cuts them, behind any byte: text and reasoning are beginnings of what the whole answer has."""
    for name, conversation in conversations().items():
        form = conversation.form
        turns = Turns(conversation.template, Variant(form.calls.as_text, form.calls.ids))
        texts = [turns.answer(turn) for turn in (turns.turn({"content": SAID}), turns.thinking())]
        if form.calls.origin != "generic":
            arguments = [TEXT, NASTY] if form.calls.gap is not None else [NASTY]
            content = SAID if form.calls.later is not None else ""
            texts += [rendered(form, turns, *arguments), rendered(form, turns, *arguments, content=content)]
        closing = form.reasoning.closing.encode() if form.reasoning else b""
        for data in map(str.encode, texts):
            thinking = form.thinks(turns.prompt) and closing in data

            def cut(
                n: int, data: bytes = data, thinking: bool = thinking, form: AnswerFormat = form
            ) -> tuple[str, str, list[Any]]:
                reader = AnswerReader(form, dict.fromkeys(NAMES, SCHEMA), thinking=thinking)
                pieces = PieceReader(reader, lambda n: data[:n])
                return together([pieces.feed(n), pieces.flush(cut=n < len(data))])

            said, thought, _ = cut(len(data))
            for n in range(len(data)):
                text, reasoning, _ = cut(n)
                assert said.startswith(text.rstrip()), (name, data[:n], text)
                assert thought.startswith(reasoning.rstrip()), (name, data[:n], reasoning)


def test_every_template_renders_tools_calls_and_results() -> None:
    tools = [
        {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": SCHEMA}}
        for name in ("look_up", "switch_on")
    ]
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": '{"alpha": "kitchen"}'}}
        for i, name in enumerate(("look_up", "switch_on"))
    ]
    messages = [
        {"role": "user", "content": "Turn it on."},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_0", "content": "RESULTONE"},
        {"role": "tool", "tool_call_id": "call_1", "content": "RESULTTWO"},
    ]
    refused = {}
    for name, conversation in conversations().items():
        try:
            text = conversation.render({"messages": messages, "tools": tools})
        except TemplateRefusal as error:
            refused[name] = str(error)
            continue
        for part in ("look_up", "switch_on", "kitchen", "RESULTONE", "RESULTTWO"):
            if part not in text:
                refused[name] = f"{part} is missing"
    assert not refused


def test_an_answer_is_what_the_template_makes_of_it() -> None:
    """The words of a call as a training target are those that are read as one."""
    for name, conversation, form, _ in own():
        call = {"id": "call00001", "type": "function", "function": {"name": NAMES[0], "arguments": json.dumps(NASTY)}}
        tools = [{"type": "function", "function": {"name": each, "parameters": SCHEMA}} for each in NAMES]
        input = {"messages": [{"role": "user", "content": "QUESTIONQ"}], "tools": tools}
        text = conversation.answer(input, {"role": "assistant", "content": "", "tool_calls": [call]})
        reader = AnswerReader(form, dict.fromkeys(NAMES, SCHEMA))
        parts = [reader.feed(text), reader.flush()]
        written = "".join(call.arguments for part in parts for call in part.calls)
        assert json.loads(written) == NASTY, (name, text)


class Bytes:
    """A vocabulary as llguidance reads it."""

    bos_token_id = None
    eos_token_id = 0

    def __init__(self, form: AnswerFormat) -> None:
        pattern = re.compile(r"<[|｜][^<>]*?[|｜]>|\[[A-Z_]{3,}\]|</?tool_call>")
        texts = sorted({text for marker in form.markers() for text in pattern.findall(marker)})
        self.controls = {text: i + 1 for i, text in enumerate(texts)}
        self.special_token_ids = list(range(len(texts) + 1))
        self.tokens = [b"\xff<end>", *(b"\xff" + text.encode() for text in texts), *(bytes([i]) for i in range(256))]
        self._split = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else re.compile("(?!)")
        self.tokenizer = LLTokenizer(llguidance.TokenizerWrapper(self), n_vocab=len(self.tokens), eos_token=[0])

    def __call__(self, text: bytes) -> list[int]:
        return [byte + len(self.special_token_ids) for byte in text]

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = []
        for part in self._split.split(text):
            tokens += [self.controls[part]] if part in self.controls else self(part.encode())
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(self.tokens[token].removeprefix(b"\xff") for token in tokens).decode()


def plan(form: AnswerFormat, vocabulary: Bytes, parameters: Any, **choice: Any) -> AnswerPlan:
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in NAMES]
    return AnswerPlan(form, tool_use({"tools": tools, **choice}), vocabulary.controls, False, False)


def test_the_constraint_lets_the_models_own_calls_through() -> None:
    plain = {"type": "object", "properties": {"alpha": {"type": "string"}, "beta": {"type": "integer"}}}
    for name, _, form, turns in own():
        vocabulary = Bytes(form)
        for choice in ("required", "auto"):
            grammar, whole = plan(form, vocabulary, plain, tool_choice=choice).grammar()
            for arguments in ([NOTHING], [{"alpha": 'so "x" {} \\', "beta": 7}], [{"beta": 7}]):
                text = rendered(form, turns, *arguments).rstrip()
                if form.reasoning:
                    text = re.sub(
                        rf"^\s*({re.escape(form.reasoning.opening)})?\s*{re.escape(form.reasoning.closing)}", "", text
                    )
                if not whole:
                    trigger = next(each for each in form.calls.triggers(NAMES) if each in text)
                    text = text[text.index(trigger) :]
                matcher = LLMatcher(vocabulary.tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
                tokens = vocabulary.tokenize(text)
                assert matcher.try_consume_tokens(tokens) == len(tokens), (name, choice, text, matcher.get_error())
                assert matcher.is_accepting(), (name, choice, text)


SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["low", "high"]},
        "level": {"type": "integer", "minimum": 1, "maximum": 9},
        "on": {"type": "boolean"},
        "name": {"type": "string", "maxLength": 3},
        "code": {"type": "string", "pattern": "^[a-c]{2,4}$|^z.$"},
        "list": {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 1, "maxItems": 2},
    },
    "required": ["unit", "level"],
}


def drawn(vocabulary: Bytes, grammar: str, draw: np.random.Generator, enough: int) -> tuple[str, bool]:
    """A random answer, and whether it came to its end; after so many tokens it ends as soon as it may."""
    matcher = LLMatcher(vocabulary.tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens: list[int] = []
    while len(tokens) < 1500:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: len(vocabulary.tokens)])
        token = 0 if 0 in allowed and len(tokens) > enough else int(draw.choice(allowed))
        if token == 0:
            return vocabulary.text(tokens), True
        assert matcher.consume_token(token)
        tokens.append(token)
    return "", False


def called(form: AnswerFormat, parameters: Any, text: str) -> list[str]:
    """The arguments of the calls in an answer."""
    reader = AnswerReader(form, dict.fromkeys(NAMES, parameters))
    calls: list[str] = []
    for call in (call for part in (reader.feed(text), reader.flush()) for call in part.calls):
        if call.name is not None:
            assert call.name in NAMES
            calls.append("")
        calls[-1] += call.arguments
    return calls


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


_DIGITS = {"type": "string", "pattern": "^[0-9]{2}$"}
SHAPES: list[dict[str, Any]] = [
    {**of(a={"$ref": "#/$defs/d"}, b={"allOf": [{"$ref": "#/$defs/e"}], "default": "x"}),
     "$defs": {"d": _DIGITS, "e": {"enum": ["1", "x"]}}},
    {**of(a={"$ref": "#/$defs/i", "maximum": 3}), "$defs": {"i": {"type": "integer", "minimum": 0, "maximum": 9}}},
    of(a={"allOf": [{"type": "integer", "minimum": 0}, {"maximum": 3}]}),
    of(a={"anyOf": [_DIGITS, {"type": "boolean"}]}, b={"type": ["string", "integer"], "enum": ["1", 2]}),
    of(a={"anyOf": [{"type": "string", "pattern": "^[0-9]{3}$"}, {"type": "integer", "minimum": 1, "maximum": 9}]}),
    of(a={"const": 'x "y" \\ z\n'}, b={"const": 5}, c={"const": None}, d={"const": {"k": ["v", True]}}),
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a", "undeclared"]},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["more"],
     "additionalProperties": {"type": "null"}},
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=json.dumps)
def test_calls_are_held_to_schemas_of_every_shape(shape: dict[str, Any]) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="it has no wheel for Python 3.10")
    validator, draw = jsonschema_rs.validator_for(shape), np.random.default_rng(0)
    for name in (
        "Qwen3-Coder",
        "LFM2.5-8B-A1B",
        "google-gemma-4-31B-it",
        "Qwen-Qwen3-0.6B",
        "deepseek-ai-DeepSeek-V3.2",
    ):
        form = conversations()[name].form
        vocabulary = Bytes(form)
        grammar, _ = plan(form, vocabulary, shape, tool_choice="required", parallel_tool_calls=False).grammar()
        for _ in range(3):
            text, ended = drawn(vocabulary, grammar, draw, 20)
            for written in called(form, shape, text) if ended else ():
                assert validator.is_valid(json.loads(written)), (name, text, written)


def test_a_name_that_must_be_there_and_may_not_is_refused() -> None:
    form = conversations()["Qwen3-Coder"].form
    shape = {**of(a={"type": "boolean"}), "required": ["b"]}
    with pytest.raises(InvalidRequest, match="requires 'b'"):
        plan(form, Bytes(form), shape, tool_choice="required").grammar()


def test_all_that_the_constraint_lets_through_is_a_valid_call() -> None:
    """Random answers, with and without several calls in one."""
    draw = np.random.default_rng(0)
    for name, _, form, _ in own():
        vocabulary = Bytes(form)
        for parallel in (True, False):
            grammar, _whole = plan(
                form, vocabulary, SMALL, tool_choice="required", parallel_tool_calls=parallel
            ).grammar()
            text, ended = drawn(vocabulary, grammar, draw, 200)
            assert ended, (name, text)
            calls = called(form, SMALL, text)
            assert calls, (name, text)
            assert parallel or len(calls) == 1, (name, text)
            for written in calls:
                arguments = json.loads(written)
                assert {"unit", "level"} <= arguments.keys() <= SMALL["properties"].keys(), (name, text)
                assert arguments["unit"] in ("low", "high"), (name, text)
                assert arguments["level"] in range(1, 10), (name, text)
                assert isinstance(arguments.get("on", True), bool), (name, text)
                assert isinstance(arguments.get("name", ""), str), (name, text)
                assert len(arguments.get("name", "")) <= 3, (name, text)
                assert re.search("^[a-c]{2,4}$|^z.$", str(arguments.get("code", "za"))), (name, text)
                assert 1 <= len(arguments.get("list", [1])) <= 2, (name, text)


ROLES = {"s": "system", "u": "user", "a": "assistant"}
CALLED = [{"id": f"abcdefgh{i}", "type": "function", "function": {"name": NAMES[i], "arguments": "{}"}} for i in (0, 1)]
RESULTS: list[dict[str, Any]] = [
    {"role": "tool", "tool_call_id": call["id"], "content": f"({call['id']})"} for call in CALLED
]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in NAMES]


def said(shape: str) -> list[dict[str, Any]]:
    return [{"role": ROLES[who], "content": f"({number} speaks)"} for number, who in enumerate(shape)]


def test_a_template_shows_all_that_is_said_by_whomever_and_nothing_of_it_is_learned() -> None:
    user, between, *_, again = said("usau")
    called = {"role": "assistant", "content": "", "tool_calls": CALLED}
    asked = [said(shape) for shape in ("s", "su", "ssuau", "usu", "us", "suasuasu", "suuau", "suaau", "sau")]
    for name, room in conversations().items():
        for messages in (*asked, [*said("su"), called, between, *RESULTS, again]):
            for tools in ({}, {"tools": TOOLS}):
                text = room.render({"messages": messages, **tools})
                assert [each["content"] for each in messages if each["content"] not in text] == [], name
        for messages in (said("su"), said("suau"), [user]):
            for answer in (called, {"role": "assistant", "content": "Yes."}):
                assert "speaks)" not in room.answer({"messages": messages, "tools": TOOLS}, answer), name
