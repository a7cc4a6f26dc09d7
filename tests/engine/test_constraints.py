"""A constraint is obeyed or refused by both engines, never ignored, and never at the others' expense."""

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from agentd.engine.calls.answer_plan import AnswerPlan
from agentd.engine.constraints import Compiler, Constraint
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Engine, Sampling
from agentd.errors import ConstraintTooComplex
from tests.support.engine_samples import ENGINES, GREEDY, ask, chat, finish, raw, refusal
from tools import tiny_model

SEEDS = 20
AT_ONCE = {"llamacpp": SEEDS, "transformers": 6}  # both are masked by the same code; here a token takes 8 x as long
HOT = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
# No answer of less than this many letters may end: a test that waits for a certain mask meets it, whatever is drawn.
ENDLESS = "root ::= [a-z]{1000}"

VALID: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 1, "maximum": 5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "integer", "multipleOf": 5},
    {"type": ["string", "null"], "enum": ["a", "b", None]},
    {"type": ["array", "null"], "items": {"type": "integer"}},
    {"type": ["object", "null"], "properties": {"x": {"type": "integer"}}, "required": ["x"],
     "additionalProperties": False},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "object", "required": ["x"]},
    {"type": "object", "properties": {"x": {"title": "any"}}, "required": ["x"]},
    {"type": "string", "format": "email"},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"c": {"$ref": "#"}}, "additionalProperties": False},
    {"type": "string"},
    {},
    {"type": "string", "pattern": "^[a-c]{2}[0-9]+$"},
    {"type": "string", "pattern": "b"},
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": None}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "integer", "maximum": -3}, {"const": {"a": [1, "\n"]}}]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 9}]},
    {"$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 20}}, "type": "array", "items": {"$ref": "#/$defs/n"}},
    {"type": "object", "patternProperties": {"^s_": {"type": "boolean"}}, "additionalProperties": False},
    *({"type": "string", "format": name} for name in (
        "date", "time", "date-time", "duration", "hostname", "ipv4", "ipv6", "uuid", "uri"
    )),
    {"type": "array", "items": {"anyOf": [{"type": "string", "format": "email"}]}, "minItems": 1},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "integer", "exclusiveMinimum": 2**53 - 2, "exclusiveMaximum": 2**53 + 2},
    {"type": "number", "minimum": -1e300, "maximum": 1e300},
    {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": False, "maxItems": 2},
    *({"type": "string", "format": name} for name in ("uuid4", "base64")),
    {"type": "string", "format": "password", "maxLength": 3},
    {"type": "string", "pattern": "^[^\"]{3}$"},
    {"type": "string", "pattern": "^[\\x00-\\x1f]{2}$"},
    {"type": "string", "pattern": "^\\W\\D\\S\\s$"},
]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "banana"}, "banana"),
    ({"type": "integer", "multipleOf": 231107}, "multipleOf"),
    ({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf"),
    ({"type": "number", "multipleOf": 0.0231107}, "multipleOf"),
    ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, "not"),
    ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({"properties": {"deep": {"items": {"unevaluatedItems": False}}}}, "unevaluatedItems"),
    ({"type": "integer", "divisibleBy": 2}, "divisibleBy"),
    ({"x-guidance": {"lenient": True}, "contains": {}}, "x-guidance"),
    ({"type": "string", "format": "no-such-format"}, "no-such-format"),
    ({"$ref": "https://example.com/schema.json"}, "example.com"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum|maximum|[Uu]nsatisfiable"),
    # the first two of these ended the engine: what is told apart by a double is all that llguidance computes with
    ({"const": -(2**63)}, "const has -9223372036854775808"),
    ({"properties": {"a": {"enum": [1, {"b": [-1e308]}]}}}, "enum has -1e"),
    ({"const": 2**53 + 1}, "const has 9007199254740993"),
    ({"type": "integer", "minimum": 10**20}, "minimum is 1"),
    ({"type": "number", "exclusiveMaximum": -1e17}, "exclusiveMaximum is -1e"),
    ({"type": ["integer", "number"], "enum": [-1e15, 3e-5]}, "cannot be compiled"),
    ({"x-other": {"const": -(2**63)}, "$ref": "#/x-other"}, "x-other"),
    ({"default": {"not": {}}, "$ref": "#/default"}, "default"),
    ({"type": "integer", "multipleOf": -2}, "multipleOf"),
    ({"$defs": {"unused": {"type": "sting"}}, "type": "null"}, "sting"),
    ({"type": "object", "properties": {"a": {"type": ["integer", "txt"]}}}, "txt"),
    ({"title": 5, "type": "null"}, "title"),
    ({"type": "string", "pattern": "^\\Aa\\Z$"}, "dialects"),
    ({"type": "object", "patternProperties": {"[[:alpha:]]": {}}}, "dialects"),
]
CONSTANTS = [
    *("C:\\temp", "a\nb", 'say "hi"', "😀", "café", "cafe\u0301", "a\tb", "\\n", "\u0001", "</s>", "<|im_end|>", "a\\"),
    *(" ", "", "\u00a0", "a/b", "日本", "'", "{}", '[1, "x\\n"]', "\u2028", "<|im_start|>system"),
]
POISON: list[dict[str, Any]] = [
    {"json_schema": {"type": "string", "maxLength": 65536}},
    {"json_schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 20000}},
    {"json_schema": {"type": "string", "minLength": 200_000_000}},
    {"json_schema": {"type": "string", "pattern": "^(((a{0,60}){0,60}){0,60})$"}},
    {"grammar": 'root ::= "a"{2,1}'},
    {"grammar": 'root ::= s\ns ::= "a" s "b" | "a" s "c" | "a" "b"'},
    {"grammar": 'root ::= ("a" | "a" "a" | "a" "a" "a")* "b"'},
    {"grammar": "root ::= " + "(" * 30 + "[a-z]" + ")+" * 30},
    {"grammar": "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000},
    {"grammar": 'root ::= ("a"{0,9999} "b"?){0,9999}'},
]


@pytest.fixture(scope="module", params=sorted(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Of a model that says anything: what comes out well is the constraint's doing."""
    local = ENGINES[name](tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))
    yield local
    local.close()


def schema(tree: Any, **settings: Any) -> Sampling:
    return replace(HOT, json_schema=json.dumps(tree), **settings)


@pytest.mark.parametrize("tree", VALID, ids=json.dumps)
def test_every_answer_that_ends_by_itself_is_valid(name: str, engine: Engine, tree: dict[str, Any]) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="it has no wheel for Python 3.10")
    validator = jsonschema_rs.validator_for(tree, validate_formats=True)
    requests = [chat(str(i), "Answer.", schema(tree, seed=i), max_tokens=200) for i in range(SEEDS)]
    ended: list[str] = []
    for first in range(0, SEEDS, AT_ONCE[name]):
        answers = ask(engine, *requests[first : first + AT_ONCE[name]])
        ended += [answer.text for answer in answers if answer.last.finish == "stop"]
        if ended:
            break
    assert ended
    assert [text for text in ended if not validator.is_valid(json.loads(text))] == []


@pytest.mark.parametrize(("tree", "named"), REFUSED, ids=str)
def test_what_cannot_be_obeyed_is_refused_by_name(engine: Engine, tree: dict[str, Any], named: str) -> None:
    start = time.process_time()
    reason = refusal(engine, chat("no", "Answer.", schema(tree)))
    assert re.search(named, reason), reason
    assert time.process_time() - start < 1


@pytest.mark.parametrize("text", CONSTANTS, ids=repr)
def test_constants_come_back_exactly(engine: Engine, text: str) -> None:
    trees: list[dict[str, Any]] = [{"const": text}, {"enum": [text]}]
    for tree in trees:
        answer = ask(engine, chat("const", "Answer.", schema(tree, seed=1), max_tokens=200))[0]
        assert (json.loads(answer.text), answer.last.finish) == (text, "stop")
    tree = {"type": "object", "properties": {text: {"const": 1}}, "required": [text], "additionalProperties": False}
    answer = ask(engine, chat("property", "Answer.", schema(tree, seed=1), max_tokens=200))[0]
    assert (json.loads(answer.text), answer.last.finish) == ({text: 1}, "stop")
    if text:
        for request in (chat("choice", "Answer."), raw("raw", "Answer:"), raw("raw", "Answer: ")):
            assert ask(engine, replace(request, choices=(text,), max_tokens=200))[0].text == text


@pytest.mark.parametrize("poison", POISON, ids=lambda poison: str(poison)[:60])
def test_poison_is_answered_or_refused_while_another_stream_goes_on(engine: Engine, poison: dict[str, Any]) -> None:
    said = {"json_schema": json.dumps(poison["json_schema"])} if "json_schema" in poison else poison
    (bias,) = ask(engine, chat("a", "a", replace(GREEDY, grammar='root ::= "a"'), logprobs=0))[0].logprobs[:1]
    token = next(t for t in range(engine.info.n_vocab) if bias["token"] == "a" and t == 3 + ord("a")) if bias else 0
    fond = replace(HOT, seed=1, logit_bias=((token, 100.0),), **said)
    engine.submit(chat("poison", "Answer.", fond, max_tokens=200))
    engine.submit(chat("other", "Tell.", GREEDY, max_tokens=60))
    # Of all threads: one that holds Python's lock shows, other processes do not.
    gaps, before = [], time.process_time()
    pieces = []
    while engine.busy:
        for piece in engine.step():
            pieces.append(piece)
            if piece.key == "other":
                now = time.process_time()
                gaps.append(now - before)
                before = now
    ends = {piece.key: piece for piece in pieces if piece.finish or piece.error}
    assert ends["other"].finish
    assert max(gaps) < 1
    assert ends["poison"].finish or ends["poison"].error["status"] == 400  # type: ignore[index]  # then it has one


def test_an_ordinary_limit_works(engine: Engine) -> None:
    tree = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 2000}}, "required": ["text"]}
    answer = ask(engine, chat("limit", "Answer.", schema(tree, seed=0), max_tokens=20))[0]
    assert answer.last.finish in ("stop", "length")


def test_a_matcher_at_its_limit_ends_its_own_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Constraint.allowed, [0]

    def limited(self: Constraint) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise ConstraintTooComplex("LexerTooComplex")
        return real(self)

    monkeypatch.setattr(Constraint, "allowed", limited)
    free = Sampling(temperature=1.0)
    engine.submit(chat("constrained", "Answer.", replace(free, grammar=ENDLESS), max_tokens=50))
    engine.submit(chat("free", "Tell.", free, max_tokens=12))
    answers = finish(engine)
    assert answers["constrained"].last.error is not None
    assert answers["constrained"].last.error["code"] == "constraint_too_complex"
    assert len(answers["constrained"].text) >= 3
    assert answers["free"].last.finish


def test_who_waits_for_a_mask_holds_up_no_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, release, n_masks = Constraint._compute, threading.Event(), [0]

    def slow(self: Constraint) -> Any:
        n_masks[0] += 1
        if n_masks[0] == 4:  # when some tokens have come
            release.wait(30)
        return real(self)

    free = Sampling(temperature=1.0)
    engine.submit(chat("warm", "Answer.", replace(free, grammar=ENDLESS), max_tokens=2))
    finish(engine)
    monkeypatch.setattr(Constraint, "_compute", slow)
    engine.submit(chat("constrained", "Answer.", replace(free, grammar=ENDLESS), max_tokens=8))
    engine.submit(chat("free", "Tell.", free, max_tokens=40))
    ended: list[str] = []
    while "free" not in ended:
        ended += [piece.key for piece in engine.step() if piece.finish or piece.error]
    assert ended == ["free"]
    release.set()
    answer = finish(engine)["constrained"]
    assert answer.last.finish in ("stop", "length")


def test_what_compiles_for_too_long_is_given_up_and_others_are_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(engine, chat("warm", "Hello", replace(GREEDY, grammar='root ::= "a"')))
    real, release, released = Compiler.compile, threading.Event(), threading.Event()

    def slow(self: Compiler, sampling: Sampling, plan: AnswerPlan | None = None) -> Constraint:
        if sampling.grammar == 'root ::= "slow"':
            release.wait(30)
            released.set()
        return real(self, sampling, plan)

    monkeypatch.setattr(Compiler, "compile", slow)
    engine.submit(chat("slow", "Hello", replace(GREEDY, grammar='root ::= "slow"')))
    engine.submit(chat("next", "Hello", replace(GREEDY, grammar='root ::= "next"')))
    answers = finish(engine)
    assert not released.is_set()
    assert answers["next"].text == "next"
    assert answers["slow"].last.error is not None
    assert answers["slow"].last.error["code"] == "constraint_too_complex"
    release.set()


def test_a_closed_compiler_reads_its_vocabulary_no_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that compile or compute masks go on behind it, but the vocabulary is freed then."""
    vocabulary: Prompts = engine.vocabulary  # type: ignore[attr-defined]  # every language engine has one
    compiler = Compiler(vocabulary)
    constraint = compiler.compile(Sampling(json_schema='{"const": "a long text that must come"}'))
    tokenize = vocabulary.tokenize
    reads, reading, go_on = 0, threading.Event(), threading.Event()

    def slow(text: str) -> list[int]:
        nonlocal reads
        reads += 1
        reading.set()
        assert go_on.wait(30)
        return tokenize(text)

    monkeypatch.setattr(vocabulary, "tokenize", slow)
    constraint.prepare()
    assert reading.wait(30)
    closing = threading.Thread(target=compiler.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()  # it is being read
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    at_the_end = reads
    assert constraint.allowed() is not None
    with pytest.raises(RuntimeError):
        constraint.prepare()
    sampling = Sampling(json_schema='{"const": "another text that must come"}')
    assert compiler.compile(sampling).allowed() is not None  # as a thread does that is at it
    assert reads == at_the_end
    late = Compiler(vocabulary)
    late.close()
    with pytest.raises(ConstraintTooComplex, match="unloaded"):
        late.compile(sampling)


def test_a_request_that_waits_for_its_constraint_can_be_cancelled(engine: Engine) -> None:
    engine.submit(chat("gone", "Hello", replace(GREEDY, grammar="root ::= [a-z]+")))
    engine.cancel("gone")
    assert not engine.busy


# --- a choice is the likeliest answer as a whole, as the gate has it

LABELS = [
    ["positive", "negative"],
    ["not at all funny", "not sure", "funny"],
    ["no", "no way", "no way at all", "yes"],
    ["1", "2", "3", "10", "11", "12"],
    ["yes", "Yes", "YES", " yes"],
    [f"label {i}" for i in range(60)],
    ["ü", "üb", "über", "</s>", "<|im_end|>"],
]


@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: labels[0])
def test_what_is_served_is_what_the_gate_judges(engine: Engine, labels: list[str]) -> None:
    texts = ["A fine film.", "Dull and long.", "x", "Is it 11?"]
    inputs: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    inputs += [{"prompt": text + "\nLabel:"} for text in texts]
    background = engine.background(lambda: False)
    scores = [background.encode(input, labels, labels[0]) for input in inputs]
    judged = [score.choices for some in background.score(scores) for score in some]
    background.close()
    for i, (input, likelihoods) in enumerate(zip(inputs, judged, strict=True)):
        request = replace(chat(str(i), "", GREEDY), input=input, choices=tuple(labels), max_tokens=100)
        chosen = labels.index(ask(engine, request)[0].text)
        # Rounding depends on how tokens are batched; what is served is the best to that precision.
        assert likelihoods[chosen] == pytest.approx(max(likelihoods), abs=1e-2)


def test_at_a_temperature_a_choice_is_drawn_by_the_likelihoods_of_whole_answers(engine: Engine) -> None:
    labels = ("a", "no", "no way")
    background = engine.background(lambda: False)
    encoded = background.encode({"messages": [{"role": "user", "content": "x"}]}, labels, "a")
    (scores,) = next(iter(background.score([encoded])))
    background.close()
    spread = 8.0
    weights = [math.exp((score - max(scores.choices)) / spread) for score in scores.choices]
    expected = [weight / sum(weights) for weight in weights]
    n = 300
    hot = replace(HOT, temperature=spread)
    requests = [chat(str(i), "x", replace(hot, seed=i), choices=labels) for i in range(n)]
    drawn = [answer.text for answer in ask(engine, *requests)]
    for label, p in zip(labels, expected, strict=True):
        assert abs(drawn.count(label) / n - p) < 4 * math.sqrt(p * (1 - p) / n) + 1e-3


def test_the_log_probabilities_of_a_choice_are_those_of_its_tokens(engine: Engine) -> None:
    labels = ("no", "no way")
    answer = ask(engine, chat("p", "x", choices=labels, logprobs=2))[0]
    assert "".join(entry["token"] for entry in answer.logprobs) == answer.text
    assert all(len(entry["top_logprobs"]) == 2 for entry in answer.logprobs)


def test_many_long_choices_are_told_apart_in_little_time(engine: Engine) -> None:
    labels = tuple(
        "It is a film of which one can say, after some thought, " * 2 + f"that it is {i}" for i in range(256)
    )
    start = time.process_time()
    answer = ask(engine, chat("many", "x", choices=labels, max_tokens=200))[0]
    assert answer.text in labels
    assert time.process_time() - start < 20
