"""Errors and requests survive the pipe."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from agentd import errors
from agentd.engine.operations import (
    Classify,
    Learn,
    LearnReport,
    Operation,
    Pair,
    Refusals,
    ScoreExamples,
    SetRule,
    SignStepReport,
    Stage,
    Submit,
    Tap,
)
from agentd.engine.process import wire
from agentd.engine.protocol import AdapterSpec, Classification, Generate, LearningRule, Sampling, Scores, TapIndex
from agentd.errors import AgentdError


def over(error: BaseException) -> AgentdError:
    return wire.revive(json.loads(wire.pack(wire.describe(error))))


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("wrong", param="grammar"),
        errors.ContextLengthExceeded(900, 512),
        errors.RevisionCorrupt(3, "cut short"),
        errors.ModelUnusable("model.gguf", "it is no GGUF"),
        errors.EngineUnavailable("it starts"),
        errors.AgentdError("something"),
    ],
)
def test_an_error_of_ours_stays_what_it_was(error: AgentdError) -> None:
    revived = over(error)
    assert type(revived) is type(error)
    assert str(revived) == str(error)
    for name in ("status", "type", "code"):
        assert getattr(revived, name) == getattr(error, name)
    assert getattr(revived, "param", None) == getattr(error, "param", None)


def test_any_other_error_is_named_and_is_a_server_error() -> None:
    revived = over(ZeroDivisionError("division by zero"))
    assert type(revived) is AgentdError
    assert str(revived) == "ZeroDivisionError: division by zero"
    assert revived.status == 500


@pytest.mark.parametrize("name", ["Sequence", "NoSuchError", "__doc__"])
def test_a_class_that_is_no_error_of_ours_is_not_made(name: str) -> None:
    assert type(wire.revive({"class": name, "message": "x"})) is AgentdError


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b\x85c", "😀", "\ud83d", '"\\'])
def test_a_message_of_any_content_is_one_line(text: str) -> None:
    packed = wire.pack({"text": text})
    assert packed.endswith(b"\n")
    assert packed.count(b"\n") == 1
    assert json.loads(packed) == {"text": text}


def test_a_request_is_the_same_at_the_other_end() -> None:
    sampling = Sampling(temperature=0.5, seed=3, logit_bias=((5, -1.5), (7, 2.0)), grammar="root ::= [0-9]")
    request = Generate("k", {"prompt": "x"}, sampling, 7, ("a", "b"), 2, ("yes", "no"))
    submit = Submit(request)
    assert wire.operation(json.loads(wire.command(7, submit))) == submit


@pytest.mark.parametrize(
    ("operation", "result", "progress"),
    [
        (ScoreExamples([0, 3]), [Scores([-1.5, -0.0], [-math.inf]), Scores([], [0.25])], 7),
        (Tap([1], 2, 3, Path("tap")), TapIndex(4, 1, 9, [1, 4]), 1),
        (Pair([0], 0.1, (1 << 64) - 1, 1e-3), (0.1, math.inf), None),
        (Stage("4", Path("/a b/ä.gguf"), None), None, None),
        (SetRule(LearningRule(blocks=3, adapters=AdapterSpec("lora", 4, 8.0, (1 << 63) + 1))), None, None),
        (
            Learn([0], [], 7, 2, True, 10, 4, 5, (7, 32), (1, 0), (2,), Path("net"), Path("ledger")),
            LearnReport(10, 3, 3, None, 0.5, None, 1.0),
            SignStepReport(1, 99, -1, 0.7, 0.6, 0.5),
        ),
        (Refusals([{"prompt": "a"}, {"messages": []}]), [None, "no"], None),
        (Classify({"array": []}), Classification([0.5, 0.5], 3), None),
    ],
)
def test_operations_and_what_comes_of_them_keep_their_types(
    operation: Operation[Any, Any], result: Any, progress: Any
) -> None:
    assert wire.operation(json.loads(wire.command(1, operation))) == operation
    message = json.loads(wire.pack({"result": result, "progress": progress}))
    assert wire.result(operation, message["result"]) == result
    assert wire.progress(operation, message["progress"]) == progress
