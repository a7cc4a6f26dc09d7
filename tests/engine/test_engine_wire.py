"""Errors and requests survive the pipe."""

import json
from dataclasses import asdict

import pytest

from agentd import errors
from agentd.engine import wire
from agentd.engine.protocol import Generate, Sampling
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
def test_a_message_is_one_line_whatever_it_holds(text: str) -> None:
    packed = wire.pack({"text": text})
    assert packed.endswith(b"\n")
    assert packed.count(b"\n") == 1
    assert json.loads(packed) == {"text": text}


def test_a_request_is_the_same_at_the_other_end() -> None:
    sampling = Sampling(temperature=0.5, seed=3, logit_bias=((5, -1.5), (7, 2.0)), grammar="root ::= [0-9]")
    request = Generate("k", {"prompt": "x"}, sampling, 7, ("a", "b"), 2, ("yes", "no"))
    assert Generate.from_json(json.loads(wire.pack(asdict(request)))) == request
