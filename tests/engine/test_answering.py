"""Examples answered in the background: what serving says to the same requests, however often it cuts in."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.engine.operations import Answer, Answered, Use
from agentd.engine.protocol import Engine, Generate, Piece, Sampling
from agentd.engine.reply import Reply
from agentd.engine.session import Session, Steps
from tests.support.engine_samples import ENGINES, write_revision
from tools import tiny_model

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"], "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"room": {"enum": ["hall", "attic", "cellar"]}, "level": {"enum": [1, 2, 3]}},
                "required": ["room"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("turn_on", "turn_off")
]


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text} for text in texts]


INPUTS: list[dict[str, Any]] = [
    *({"messages": said(f"light {i}"), "tools": TOOLS, "tool_choice": "required"} for i in range(4)),
    *({"messages": said(f"who are you, {i}?"), "tools": TOOLS} for i in range(1)),
    {"messages": said("say a number"), "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    {"prompt": "Once upon a time"},
    {"messages": said("Say. " * 40)},
]


class Interruption:
    """Asks for the processor every `every` times that it is polled."""

    def __init__(self) -> None:
        self.polls = self.every = 0

    def __call__(self) -> bool:
        self.polls += 1
        return bool(self.every) and self.polls % self.every == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", seed=3)


@pytest.fixture(scope="module", params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.engine_samples.CONTEXT", 2048)
        local = ENGINES[request.param](model)
    yield local
    local.close()


@pytest.fixture
def interruption() -> Interruption:
    return Interruption()


@pytest.fixture
def session(engine: Engine, interruption: Interruption) -> Iterator[Session]:
    opened: Session = engine.session(interruption, lambda: False)
    yield opened
    opened.close()


@pytest.fixture
def answers(session: Session, tmp_path: Path) -> Callable[..., list[Answered | None]]:
    def run(
        inputs: list[dict[str, Any]], seconds: float = 600.0, max_tokens: int = 64, **enough: Any
    ) -> list[Answered | None]:
        how = {"target": "", "max_tokens": max_tokens, "enough": enough}
        lines = [json.dumps({"input": each, **how}) for each in inputs]
        source = tmp_path / "asked.jsonl"
        source.write_text("\n".join(lines) + "\n")
        steps = session.begin(Answer(source, list(range(len(inputs))), seconds))
        reports: list[int] = []
        answered: list[Answered | None] = result(steps, reports)
        assert reports == sorted(reports)
        assert reports[-1:] in ([], [sum(each is not None for each in answered)])
        return answered

    return run


def result(steps: Steps[Any, Any], reports: list[int] | None = None) -> Any:
    """What an operation returns when it has come to its end."""
    while True:
        try:
            progress = next(steps)
        except StopIteration as stop:
            return stop.value
        if progress is not None and reports is not None:
            reports.append(progress)


def served(engine: Engine, inputs: list[dict[str, Any]], max_tokens: int = 64) -> list[tuple[str, list[Any]]]:
    """What clients get who ask for the same, alone."""
    replies = []
    for input in inputs:
        schema = json.dumps(SCHEMA) if "response_format" in input else None
        body = {name: value for name, value in input.items() if name != "response_format"}
        engine.submit(Generate("k", body, Sampling(temperature=0, json_schema=schema), max_tokens))
        reply = Reply()
        while engine.busy:
            for piece in engine.step():
                assert piece.error is None, piece.error
                reply.add(piece)
        replies.append((reply.text, reply.calls))
    return replies


def plain(answer: Answered | None) -> tuple[str, list[Any]]:
    assert answer is not None
    assert answer.error is None
    return answer.text, answer.calls


def without_ids(answer: tuple[str, list[Any]]) -> tuple[str, list[Any]]:
    """Ids of calls are drawn where the format has none."""
    text, calls = answer
    return text, [call["function"] for call in calls]


def test_answers_are_those_that_are_served(engine: Engine, answers: Callable[..., list[Answered | None]]) -> None:
    replies = [without_ids(plain(answer)) for answer in answers(INPUTS)]
    assert replies == [without_ids(answer) for answer in served(engine, INPUTS)]
    assert all(calls and not text for text, calls in replies[:4])
    assert any(text and not calls for text, calls in replies[4:5])
    assert re.match(r"\s*{\s*\"n", replies[5][0])


def test_an_answer_that_says_enough_is_cut(engine: Engine, answers: Callable[..., list[Answered | None]]) -> None:
    """Calls and texts are cut where they are told to be, each beside whole ones."""
    whole = answers(INPUTS)
    cut = answers(INPUTS, text=5)
    called = answers(INPUTS, call=True)
    for one, other in zip(whole, cut, strict=True):
        assert one is not None
        assert other is not None
        assert plain(one)[0].startswith(plain(other)[0])
        assert without_ids(plain(one))[1] == without_ids(plain(other))[1]
    assert [each.whole for each in cut[:4] if each] == [each.whole for each in whole[:4] if each]
    assert any(
        one and other and one.text > other.text and not other.whole for one, other in zip(whole, cut, strict=True)
    )
    for one, other in zip(whole, called, strict=True):
        assert one is not None
        assert other is not None
        assert bool(one.calls) == bool(other.calls)
        if one.calls:
            assert other.calls[0]["function"]["name"] == one.calls[0]["function"]["name"]
            assert one.calls[0]["function"]["arguments"].startswith(other.calls[0]["function"]["arguments"])
            assert not other.whole
        else:
            assert plain(one) == plain(other)


def test_interruptions_change_nothing(
    engine: Engine, answers: Callable[..., list[Answered | None]], interruption: Interruption
) -> None:
    expected = [without_ids(plain(answer)) for answer in answers(INPUTS)]
    interruption.every = 1009
    before = interruption.polls
    assert [without_ids(plain(answer)) for answer in answers(INPUTS)] == expected
    assert interruption.polls > before + 1009


def test_requests_are_served_meanwhile(engine: Engine, session: Session, tmp_path: Path) -> None:
    alone = served(engine, INPUTS[:1])
    source = tmp_path / "asked.jsonl"
    source.write_text("".join(json.dumps({"input": each, "target": "x" * 8}) + "\n" for each in INPUTS))
    steps = session.begin(Answer(source, list(range(len(INPUTS))), 600.0))
    for _ in range(len(INPUTS) + 20):
        next(steps)
    assert [without_ids(a) for a in served(engine, INPUTS[:1])] == [without_ids(a) for a in alone]
    assert None not in result(steps)


def test_what_is_not_answered_in_time_is_none(answers: Callable[..., list[Answered | None]]) -> None:
    assert answers(INPUTS[:3], seconds=0.0) == [None] * 3


def test_what_cannot_be_answered_says_why(answers: Callable[..., list[Answered | None]]) -> None:
    wrong = {"messages": said("hi"), "tools": TOOLS, "response_format": {"type": "json_object"}, "grammar": None}
    too_long = {"prompt": "a" * 4000}
    fine, refused = answers([wrong, too_long])
    assert fine is not None
    assert fine.error is None
    assert refused is not None
    assert refused.error is not None
    assert "tokens" in refused.error


def test_the_weights_in_use_answer(
    engine: Engine,
    session: Session,
    answers: Callable[..., list[Answered | None]],
    model: Path,
    tmp_path: Path,
) -> None:
    base = answers(INPUTS[-2:])
    engine.stage("7", write_revision(engine, tmp_path / "revision", model, seed=1, size=8.0), None)
    use: Steps[None, None] = session.begin(Use("7"))
    result(use)
    changed = answers(INPUTS[-2:])
    assert changed != base
    engine.swap("7")
    try:
        assert [plain(each) for each in changed] == served(engine, INPUTS[-2:])
    finally:
        engine.swap("0")
        engine.unstage("7")


LABELS = [
    ["yes", "no"],
    ["not at all funny", "not sure", "funny"],
    ["1", "10", "100", "2"],
    [f"{part} {fault}" for part in ("plot", "cast", "pace") for fault in ("too slow", "dull", "odd")],
]


def test_a_choice_is_made_to_the_last_bit_as_it_is_served(
    engine: Engine, model: Path, interruption: Interruption, tmp_path: Path
) -> None:
    """Near ties would turn with what shares a batch: short and long prompts, beside each other, with other weights."""
    prompts = [{"messages": said(f"Which one? {'Dull, loud. ' * n}")} for n in (1, 9, 40)]
    requests = [
        Generate(f"{i} {j}", prompt, Sampling(temperature=0), 32, choices=tuple(labels), logprobs=1)
        for i, labels in enumerate(LABELS)
        for j, prompt in enumerate(prompts)
    ]
    engine.stage("8", write_revision(engine, tmp_path / "revision", model, seed=2, size=8.0), None)
    background = engine.background(interruption, lambda: False)
    try:
        background.use("8")
        example = background.encode(prompts[0], LABELS[0], "yes")
        scores = [each for batch in background.score([example]) for each in batch]
        for every in (0, 1009):
            interruption.every = every
            judged = _said(piece for pieces in background.answer(requests, lambda piece: False) for piece in pieces)
            interruption.every = 0
            engine.swap("8")
            for request in requests:
                engine.submit(request)
                assert judged[request.key] == _said(_served(engine))[request.key], request.choices
            engine.swap("0")
        assert [each for batch in background.score([example]) for each in batch] == scores  # it goes on as before
    finally:
        background.close()
        engine.swap("0")
        engine.unstage("8")


def _served(engine: Engine) -> Iterator[Piece]:
    while engine.busy:
        yield from engine.step()


def _said(pieces: Iterable[Piece]) -> dict[str, tuple[str, list[Any]]]:
    """By request the text and the log-probabilities of its tokens."""
    replies: dict[str, tuple[str, list[Any]]] = {}
    for piece in pieces:
        assert piece.error is None, piece.error
        text, logprobs = replies.get(piece.key, ("", []))
        replies[piece.key] = text + piece.text, logprobs + list(piece.logprobs)
    return replies
