"""What clients of the OpenAI API send and read, over the socket: their fields, nulls, prompts, streams and choices."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import tiny_model
from tools.daemon import DaemonProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def daemon(model: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(model) as process:
        process.start()
        yield process


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [HI], "max_tokens": 4, "temperature": 0, **fields}


def chunks(daemon: DaemonProcess, path: str, sent: dict[str, Any]) -> list[dict[str, Any]]:
    answer = daemon.post(path, {**sent, "stream": True})
    assert answer.status == 200, answer.body[:300]
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_what_has_no_effect_is_named_in_a_header(daemon: DaemonProcess) -> None:
    answer = daemon.post(
        CHAT, body(stream=None, prediction={}, service_tier="auto", temprature=1, **{"bäd\r\nname": 1})
    )
    assert answer.status == 200, answer.body[:300]
    named = answer.headers["x-agentd-ignored"].split(", ")
    assert set(named) == {"stream", "prediction", "service_tier", "temprature", "b%C3%A4d%0D%0Aname"}
    assert "x-agentd-ignored" not in daemon.post(CHAT, body()).headers
    for odd, shown in (("", '""'), (" ", "%20"), ("a\r\nb: c", "a%0D%0Ab%3A%20c"), ("é", "%C3%A9")):
        answer = daemon.post(CHAT, body(odd_one=1, **{odd: 1}))
        assert (answer.status, answer.headers["x-agentd-ignored"]) == (200, f"odd_one, {shown}")


def test_what_is_answered_is_taken_back(daemon: DaemonProcess) -> None:
    message = daemon.post(CHAT, body()).json["choices"][0]["message"]
    assert daemon.post(CHAT, body(messages=[HI, message, HI])).status == 200
    assert daemon.post(CHAT, body(messages=[HI, message])).status == 200  # and gone on with


def test_a_null_in_a_map_is_none(daemon: DaemonProcess) -> None:
    sent = body(metadata={"task": None, "night": "7"}, logit_bias={"5": None})
    answer = daemon.post(CHAT, sent)
    assert (answer.status, answer.json["choices"]) == (200, daemon.post(CHAT, body()).json["choices"])


def test_a_refusal_is_what_the_assistant_said(daemon: DaemonProcess) -> None:
    ways: list[dict[str, Any]] = [
        {"content": "I cannot."},
        {"refusal": "I cannot."},
        {"content": None, "refusal": "I cannot."},
        {"content": [{"type": "refusal", "refusal": "I cannot."}]},
    ]
    sent = [daemon.post(CHAT, body(seed=0, messages=[HI, {"role": "assistant", **way}, HI])) for way in ways]
    assert [answer.status for answer in sent] == [200] * len(ways)
    assert (
        len(
            {
                json.dumps([answer.json["choices"][0]["message"], answer.json["usage"]["prompt_tokens"]])
                for answer in sent
            }
        )
        == 1
    )


def test_a_schema_beside_json_object_is_obeyed(daemon: DaemonProcess) -> None:
    """As llama.cpp's server takes it."""
    form = {"type": "json_object", "schema": {"type": "integer", "minimum": 1, "maximum": 3}}
    answer = daemon.post(CHAT, body(response_format=form))
    assert answer.json["choices"][0]["message"]["content"] in ("1", "2", "3")
    assert daemon.post(CHAT, body(response_format={**form, "schema": {"type": "sting"}})).status == 400


def test_strictly_unknown_fields_are_refused(model: Path) -> None:
    with DaemonProcess(model, {"serve": {"strict": True}}) as daemon:
        daemon.start()
        assert daemon.post(CHAT, body(service_tier="auto", stream=None)).status == 200
        answer = daemon.post(CHAT, body(temprature=1))
        assert (answer.status, answer.error["param"]) == (400, "temprature")


def test_a_stream_ends_with_an_empty_chunk(daemon: DaemonProcess) -> None:
    for path, sent in ((CHAT, body(choices=["yes", "no"])), (TEXT, {"prompt": "a", "max_tokens": 3})):
        *said, last = chunks(daemon, path, sent)
        assert [chunk["choices"][0]["finish_reason"] for chunk in said] == [None] * len(said)
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        assert last["choices"][0].get("delta", {}) == {}
        assert last["choices"][0].get("text", "") == ""
        text = [
            chunk["choices"][0].get("delta", {}).get("content") or chunk["choices"][0].get("text") for chunk in said
        ]
        assert "".join(part or "" for part in text)


def test_log_probabilities_are_those_of_the_text(daemon: DaemonProcess) -> None:
    sent = {"prompt": "x", "grammar": 'root ::= "naïve END now"', "logprobs": 0, "stop": "END", "max_tokens": 40}
    choice = daemon.post(TEXT, sent).json["choices"][0]
    assert choice["text"] == "naïve "
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len("naïve ".encode())
    assert logprobs["text_offset"] == [0, 1, 2, 2, 3, 4, 5] or logprobs["text_offset"] == [0, 1, 2, 3, 3, 4, 5]


def test_nothing_is_a_choice_too(daemon: DaemonProcess) -> None:
    said = daemon.post(CHAT, body(choices=["", "zz"])).json["choices"][0]
    assert said["message"]["content"] in ("", "zz")
    assert said["finish_reason"] == "stop"


def test_what_is_streamed_comes_in_lines_that_no_client_cuts(daemon: DaemonProcess) -> None:
    text = "a\u2028b\u0085c"
    answer = daemon.post(CHAT, body(grammar=f'root ::= "{text}"', max_tokens=40, stream=True))
    parts = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == text


def test_the_default_of_a_choice_is_the_best_one(daemon: DaemonProcess) -> None:
    answers = {daemon.post(CHAT, {"messages": [HI], "choices": ["a", "b", "c"]}).body for _ in range(8)}
    assert len({json.loads(answer)["choices"][0]["message"]["content"] for answer in answers}) == 1


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 1e-45])
def test_a_temperature_next_to_nothing_is_greedy(daemon: DaemonProcess, temperature: float) -> None:
    greedy = daemon.post(CHAT, body()).json["choices"][0]["message"]
    assert daemon.post(CHAT, body(temperature=temperature)).json["choices"][0]["message"] == greedy


def test_constraints_that_cannot_be_obeyed_are_400(daemon: DaemonProcess) -> None:
    schema = {"type": "array", "contains": {"type": "integer"}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for sent in (body(response_format=form), body(response_format=form, stream=True)):
        answer = daemon.post(CHAT, sent)
        assert (answer.status, answer.error["param"]) == (400, "response_format")
        assert "contains" in answer.error["message"]


def test_a_model_whose_template_cannot_be_used_completes_texts(tmp_path: Path) -> None:
    with DaemonProcess(tiny_model.write(tmp_path / "odd.gguf", template="{% no_such_tag %}")) as daemon:
        daemon.start()
        answer = daemon.post(CHAT, body())
        assert answer.status == 400
        assert "no_such_tag" in answer.error["message"]
        assert daemon.post(TEXT, {"prompt": "a", "max_tokens": 2}).status == 200
