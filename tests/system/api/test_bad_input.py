"""Whatever arrives: the right status, a code, a message that says what to do, and nothing stored half."""

import contextlib
import json
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import shared
from tools.daemon import Answer, DaemonProcess, UnixConnection, eventually, exchange, streaming

CHAT, TEXT, FEEDBACK, EXAMPLES = "/v1/chat/completions", "/v1/completions", "/v1/feedback", "/v1/examples"
RESPONSES = "/v1/responses"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def daemon(model_path: Path) -> DaemonProcess:
    return shared(model_path)


def refused(daemon: DaemonProcess, path: str, body: Any, status: int, code: str, **kwargs: Any) -> dict[str, Any]:
    """The error of a request that must leave every table as it was."""
    before = daemon.counts()
    answer = daemon.post(path, body, **kwargs)
    assert (answer.status, answer.error["code"]) == (status, code), answer.body[:500]
    assert answer.headers["content-type"] == "application/json"
    assert daemon.counts() == before
    return answer.error


WRONG_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "functions": "x"}, "functions", "a valid list"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "function_call": "x"}, "function_call", "or 'auto'"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages", "content is missing"),
    (CHAT, {"messages": [{"role": "tool", "content": "x", "tool_call_id": "q"}]}, "messages", "names no call"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "type"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]},
     "messages", "messages.0.content.1.type: Input should be 'text'"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "messages", "goes with role assistant"),
    (CHAT, {"messages": MESSAGES, "stop": ["a"] * 17}, "stop", "stop: List should have at most 16 items"),
    (CHAT, {"messages": MESSAGES, "tool_choice": "any"}, "tool_choice", "tool_choice: Input should be 'none'"),
    (CHAT, {"messages": MESSAGES, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice",
     "tool_choice.function: Field required"),
    (RESPONSES, {"input": [{"type": "web_search_call", "id": "w"}]}, "input", "0.type: 'web_search_call' is none"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input.0.content.0.type"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c9", "output": ""}]}, "input", "call_id: 'c9'"),
    (CHAT, {"messages": [{"role": "wizard", "content": "Hi"}]}, "messages", "'system', 'developer', 'user'"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": MESSAGES, "temperature": "1"}, "temperature", "valid number"),
    (CHAT, {"messages": MESSAGES, "temperature": 3}, "temperature", "less than or equal to 2"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 10**30}, "max_tokens", "less than or equal"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1.5}, "max_tokens", "integer"),
    (CHAT, {"messages": MESSAGES, "stream": "yes"}, "stream", "boolean"),
    (CHAT, {"messages": MESSAGES, "n": True}, "n", "integer"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"word": 1}}, "logit_bias", "token numbers"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"99999999": 1}}, "logit_bias", "outside"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"1": 1e300}}, "logit_bias", "less than or equal to 100"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    (CHAT, {"messages": MESSAGES, "grammar": "root ::= ("}, "grammar", "GBNF"),
    (CHAT, {"messages": MESSAGES, "grammar": "root ::= root"}, "grammar", "nothing satisfies"),
    (CHAT, {"messages": MESSAGES, "grammar": "root ::= <[999999]>"}, "grammar", "there is no token 999999"),
    (CHAT, {"messages": MESSAGES, "choices": ["only"]}, "choices", "at least 2"),
    (CHAT, {"messages": MESSAGES, "metadata": {"task": 1}}, "metadata", "string"),
    (TEXT, {"prompt": ["a", "b"]}, "prompt", "send a request for each"),
    (TEXT, {"prompt": [[1, 2]]}, "prompt", "list of token numbers"),
    (TEXT, {"prompt": [10**8]}, "prompt", "there is no token"),
    (TEXT, {"prompt": ""}, "prompt", "empty"),
    (TEXT, {}, "prompt", "required"),
    (FEEDBACK, {"inference_id": "x", "kind": "label", "value": "yes", "weight": 2}, "weight", "unknown field"),
    (FEEDBACK, {"inference_id": "x", "kind": "rating", "value": 1}, "kind", "'label', 'demonstration'"),
    (FEEDBACK, {"inference_id": "x", "kind": "label"}, "value", "required"),
    (FEEDBACK, {"inference_id": "x", "kind": "label", "value": "a", "tags": {"a": 1}}, "tags", "string"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "message"), WRONG_FIELDS)
def test_fields(daemon: DaemonProcess, path: str, body: dict[str, Any], param: str, message: str) -> None:
    error = refused(daemon, path, body, 400, "invalid_request")
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


_OF_OTHERS = ["structured_outputs", "regex", "ebnf", "stop_token_ids", "bad_words", "repetition_penalty", "n_predict"]


@pytest.mark.parametrize("field", ["audio", "web_search_options", *_OF_OTHERS])
def test_what_openai_has_and_this_server_has_not(daemon: DaemonProcess, field: str) -> None:
    assert refused(daemon, CHAT, {"messages": MESSAGES, field: "x"}, 400, "not_supported")["param"] == field


BROKEN = {
    b"": "messages: Field required",
    b"{": "not valid JSON",
    b"[]": "must be a JSON object, not a list",
    b'"text"': "must be a JSON object, not a text",
    b'{"messages": [], }': "not valid JSON",
    b'{"temperature": NaN}': "NaN is not a number that JSON has",
    b'{"temperature": -Infinity}': "-Infinity is not",
    b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}': "finite number",
    b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": 1e999}}': "kwargs: a n",
    b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", "json_schema": '
    b'{"schema": {"minimum": -1e400}}}}': "response_format: a number is too large",
    b'{"max_tokens": ' + b"9" * 5000 + b"}": "too many digits",
    b'{"messages": [{"role": "user", "content": "\xff"}]}': "not UTF-8: byte 44 is 0xff",
    b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}': "not UTF-8",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "surrogate",
    '{"messages": []}'.encode("utf-16"): "not UTF-8",
    b"\x00" * 100: "not valid JSON",
    b'{"a": ' + b"[" * 100_000: "64 levels",
    b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}": "64 levels",
    b'{"a": ' + b'{"b":' * 900 + b"1" + b"}" * 901: "64 levels",
}


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: repr(body[:24]))
def test_bodies(daemon: DaemonProcess, body: bytes) -> None:
    assert BROKEN[body] in refused(daemon, CHAT, body, 400, "invalid_request")["message"]


def test_a_zero_byte_in_a_text_is_a_character_like_others(daemon: DaemonProcess) -> None:
    answer = daemon.ask("a\0b", max_tokens=1)
    assert answer.status == 200
    assert daemon.inference(answer.json["id"])["input"]["messages"][0]["content"] == "a\0b"
    note = {"inference_id": answer.json["id"], "kind": "comment", "value": "c\0d", "task": "zero\0task"}
    assert daemon.post(FEEDBACK, note).status == 201
    latest = daemon.get("/admin/feedback?limit=1", admin=True).json["feedback"][0]
    assert (latest["value"], latest["task"]) == ("c\0d", "zero\0task")


def test_a_prompt_of_10_mb_is_refused_at_once_and_the_connection_stays_usable(daemon: DaemonProcess) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    before = daemon.counts()
    with contextlib.closing(UnixConnection(daemon.api)) as connection:
        begin = daemon.cpu_seconds()
        answer = connection.answer("POST", CHAT, body)
        assert daemon.cpu_seconds() - begin < 1
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
        assert "serve.max_body" in answer.error["message"]
        begin_socket = connection.sock
        assert connection.answer("GET", "/health").status == 200
        assert connection.sock is begin_socket, "the connection was closed"
    assert daemon.counts() == before


def test_a_body_without_a_declared_length_is_given_up_when_it_grows_too_long(daemon: DaemonProcess) -> None:
    with contextlib.closing(UnixConnection(daemon.api)) as connection, contextlib.suppress(BrokenPipeError):
        connection.request(
            "POST", CHAT, iter([b"x" * 65536] * 40), {"Transfer-Encoding": "chunked"}, encode_chunked=True
        )
    with contextlib.closing(UnixConnection(daemon.api)) as connection:
        connection.connect()
        assert connection.sock is not None
        connection.sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            for _ in range(40):
                connection.sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert connection.sock.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_prompt_beyond_the_context(daemon: DaemonProcess) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 3000}]}
    error = refused(daemon, CHAT, body, 400, "context_length_exceeded")
    assert "1024" in error["message"]
    assert "model.context" in error["message"]
    assert refused(daemon, TEXT, {"prompt": "word " * 3000, "stream": True}, 400, "context_length_exceeded")


def test_an_answer_that_reaches_the_end_of_the_context_says_so(daemon: DaemonProcess) -> None:
    answer = daemon.post(TEXT, {"prompt": "word " * 1000, "max_tokens": 500, "temperature": 0})
    assert answer.status == 200
    assert answer.json["usage"]["total_tokens"] <= 1024
    assert answer.json["choices"][0]["finish_reason"] in ("length", "stop")


def test_an_unknown_model(daemon: DaemonProcess) -> None:
    error = refused(daemon, CHAT, {"messages": MESSAGES, "model": "gpt-4"}, 404, "model_not_found")
    assert daemon.status()["model"]["name"] in error["message"]


def test_a_web_page_is_not_served(daemon: DaemonProcess) -> None:
    headers = {"Origin": "https://example.org", "Content-Type": "text/plain"}
    error = refused(daemon, FEEDBACK, {"inference_id": "x"}, 403, "forbidden_origin", headers=headers)
    assert "https://example.org" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/unknown", 404, "not_found"),
        ("POST", "/v1/feedback/", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("BREW", "/health", 405, "method_not_allowed"),
        ("POST", CHAT + "?stream=true", 400, "invalid_request"),
        ("GET", "/v1/models?limit=3", 400, "invalid_request"),
    ],
)
def test_paths_and_methods(daemon: DaemonProcess, method: str, path: str, status: int, code: str) -> None:
    answer = exchange(daemon.api, method, path, b"{}" if method == "POST" else None)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert path.partition("?")[0].strip("/") in answer.error["message"] or status == 400 or code == "model_not_found"


def test_what_is_not_http_is_answered_with_400_and_hung_up(daemon: DaemonProcess) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(daemon.api))
        raw.sendall(b"\x16\x03\x01\x02\x00 this is no HTTP\r\n\r\n")
        received = b""
        while part := raw.recv(4096):
            received += part
        assert received.startswith(b"HTTP/1.1 400")


def test_the_admin_api_is_not_on_the_api_socket(daemon: DaemonProcess) -> None:
    for path in ("status", "history", "revisions", "passes", "feedback", "examples", "inferences", "events"):
        answer = daemon.get(f"/admin/{path}")
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert daemon.get(f"/admin/{path}", admin=True).status == 200
    for path in ("adapt", "cancel", "rollback", "pause", "resume"):
        assert daemon.post(f"/admin/{path}").status == 404
    assert daemon.get("/v1/models", admin=True).status == 200  # admin.sock serves all of the API


def test_the_modes_of_the_sockets_and_of_the_state(daemon: DaemonProcess) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert (mode(daemon.api), mode(daemon.admin)) == (0o660, 0o600)
    assert (mode(daemon.state), mode(daemon.state / "agentd.db")) == (0o700, 0o600)


def test_more_requests_than_slots_and_queue_are_told_to_come_again(model_path: Path) -> None:
    with DaemonProcess(model_path, {"serve": {"slots": 1, "queue": 2}}).start() as daemon:
        answers: list[Answer] = []
        body = {"messages": [{"role": "user", "content": "Write a story."}], "max_tokens": 900, "temperature": 0}
        with streaming(daemon.api, CHAT, body) as events:
            next(events)
            waiting = [threading.Thread(target=lambda: answers.append(daemon.ask())) for _ in range(2)]
            for thread in waiting:
                thread.start()
            eventually(lambda: daemon.status()["requests"]["waiting"] == 2)
            for stream in (False, True):
                answer = daemon.ask(stream=stream)
                assert (answer.status, answer.error["code"]) == (503, "overloaded")
                assert answer.headers["retry-after"] == "1"
            assert daemon.status()["requests"]["waiting"] == 2  # at once: no slot has become free
            assert daemon.get("/health").status == 200
        for thread in waiting:
            thread.join(30)
        assert [answer.status for answer in answers] == [200, 200]
        assert daemon.ask().status == 200
        assert daemon.status()["requests"]["active"] == 0
