"""POST /v1/embeddings, of both language engines: vectors, their forms, and what is refused."""

import base64
import math
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.tiny_passes import SETTINGS
from tools import tiny_model
from tools.daemon import DaemonProcess

PATH = "/v1/embeddings"


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    model = tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    settings = SETTINGS if request.param == "transformers" else {}
    with DaemonProcess(model, settings) as process:
        process.start()
        yield process


def vectors(daemon: DaemonProcess, input: Any, **fields: Any) -> list[Any]:
    answer = daemon.post(PATH, {"input": input, **fields})
    assert answer.status == 200, answer.body[:300]
    tree = answer.json
    assert [entry["index"] for entry in tree["data"]] == list(range(len(tree["data"])))
    return [entry["embedding"] for entry in tree["data"]]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_texts_become_vectors_of_length_one(daemon: DaemonProcess) -> None:
    texts = ["a lighthouse", "a lighthouse at night", "12345 67890", "x" * 300]
    answer = daemon.post(PATH, {"input": texts, "model": "default"}).json
    assert answer["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, texts)))
    assert answer["agentd"] == {"revision": 0}
    embeddings = [entry["embedding"] for entry in answer["data"]]
    assert {len(vector) for vector in embeddings} == {tiny_model.N_EMBD}
    assert all(math.isclose(cosine(v, v), 1, rel_tol=1e-5) for v in embeddings)
    assert cosine(embeddings[0], embeddings[1]) > cosine(embeddings[0], embeddings[2])
    assert vectors(daemon, texts[1]) == [embeddings[1]]  # the same alone as in company


def test_numbers_and_base64_say_the_same(daemon: DaemonProcess) -> None:
    (numbers,) = vectors(daemon, "hello", dimensions=tiny_model.N_EMBD)
    (text,) = vectors(daemon, "hello", encoding_format="base64")
    assert isinstance(text, str)
    assert list(struct.unpack(f"<{tiny_model.N_EMBD}f", base64.b64decode(text))) == numbers


def test_tokens_are_taken_as_they_are_and_texts_hold_no_control_tokens(daemon: DaemonProcess) -> None:
    one, other = vectors(daemon, [[5, 6, 7], [1, 6, 7]])
    assert vectors(daemon, [5, 6, 7]) == [one]
    assert one != other
    control, text = vectors(daemon, [[1], [2]]), vectors(daemon, "<|im_start|>")
    assert text not in ([control[0]], [control[1]])
    usage = daemon.post(PATH, {"input": "<|im_start|>"}).json["usage"]
    assert usage["prompt_tokens"] == len("<|im_start|>")


def test_what_is_wrong_is_said(daemon: DaemonProcess) -> None:
    for body, param in (
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "long " * 3000}, "input"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "model": "gpt-4"}, "model"),
    ):
        answer = daemon.post(PATH, body)
        assert answer.status == (404 if param == "model" else 400), (body, answer.body[:300])
        assert answer.error["param"] == param, body
    answer = daemon.post(PATH, {"input": "a", "user": None, "truncate": True, "dimensions": None})
    assert answer.headers["x-agentd-ignored"] == "user, dimensions, truncate"


def test_others_are_answered_meanwhile_and_as_they_are_alone(daemon: DaemonProcess) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 24, "temperature": 0}
    alone = daemon.post("/v1/chat/completions", chat).json["choices"]
    before = vectors(daemon, "y" * 200)
    busy = threading.Thread(target=lambda: vectors(daemon, ["z" * 300] * 40))
    busy.start()
    answers = [daemon.post("/v1/chat/completions", chat).json["choices"] for _ in range(3)]
    still = busy.is_alive()
    again = vectors(daemon, "y" * 200)
    busy.join()
    assert still
    assert answers == [alone] * 3
    assert again == before
