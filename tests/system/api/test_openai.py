"""Clients as people have them, unchanged, over the UNIX socket."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.support.daemon import shared
from tools.daemon import DaemonProcess, UnixConnection, eventually, streaming

HELLO: list[Any] = [{"role": "user", "content": "Say hello to the world."}]
STORY: list[Any] = [{"role": "user", "content": "Write a long story about a lighthouse."}]


@pytest.fixture(scope="module")
def daemon(real_model: Path) -> DaemonProcess:
    return shared(real_model)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[openai.OpenAI]:
    http = httpx2.Client(transport=httpx2.HTTPTransport(uds=str(daemon.api)))
    with openai.OpenAI(base_url="http://agentd/v1", api_key="unused", http_client=http, max_retries=0) as client:
        yield client


@pytest.fixture
def name(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_chat(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=HELLO, max_completion_tokens=8, temperature=0)
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == name
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.model_extra == {"agentd": {"revision": 0}}


def test_a_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI, name: str) -> None:
    whole = client.chat.completions.create(model=name, messages=HELLO, max_tokens=24, temperature=0)
    chunks = list(client.chat.completions.create(model=name, messages=HELLO, max_tokens=24, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_usage_ends_with_a_chunk_of_it(client: openai.OpenAI, name: str) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(model=name, messages=HELLO, max_tokens=4, **options)
    assert last.choices == []
    assert (last.usage.completion_tokens, last.usage.prompt_tokens > 0) == (4, True)
    assert all(chunk.choices for chunk in chunks)


def test_completions(client: openai.OpenAI, name: str) -> None:
    options: Any = {"model": name, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**options)
    assert whole.id.startswith("cmpl-")
    assert whole.choices[0].text
    streamed = client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_temperature_0_and_a_seed_each_make_answers_repeatable(client: openai.OpenAI, name: str) -> None:
    def say(**options: Any) -> str | None:
        answer = client.chat.completions.create(model=name, messages=STORY, max_tokens=12, stream=False, **options)
        text: str | None = answer.choices[0].message.content
        return text

    assert say(temperature=0) == say(temperature=0)
    assert say(seed=7, temperature=1.5) == say(seed=7, temperature=1.5)
    assert len({say(temperature=2, top_p=1, seed=seed) for seed in range(3)}) > 1


def test_stop_strings_end_the_answer_and_are_not_in_it(client: openai.OpenAI, name: str) -> None:
    options: Any = {"model": name, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 40, "temperature": 0}
    assert " 8," in client.completions.create(**options).choices[0].text
    stopped = client.completions.create(**options, stop=["never", " 8"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text.endswith("7,")


def test_logprobs_of_chat(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(
        model=name, messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 3
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert bytes(entry.bytes or []).decode("utf-8", "replace") == entry.token
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content


def test_logprobs_of_completions(client: openai.OpenAI, name: str) -> None:
    answer = client.completions.create(model=name, prompt="One two three", max_tokens=3, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert logprobs.text_offset == [0, len((logprobs.tokens or [""])[0]), len("".join((logprobs.tokens or [])[:2]))]
    assert [len(top) for top in logprobs.top_logprobs or []] == [2, 2, 2]


def test_json_mode(client: openai.OpenAI, name: str) -> None:
    ask: list[Any] = [{"role": "user", "content": "Describe a cat as JSON with the keys name and age."}]
    answer = client.chat.completions.create(
        model=name, messages=ask, max_tokens=120, temperature=0, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_json_of_a_schema(client: openai.OpenAI, name: str) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"liked": {"type": "boolean"}, "stars": {"enum": [1, 2, 3]}},
        "required": ["liked", "stars"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": "A fine film. Did they like it?"}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "review", "schema": schema, "strict": True}},
    )
    review = json.loads(answer.choices[0].message.content or "")
    assert isinstance(review["liked"], bool)
    assert review["stars"] in (1, 2, 3)


def test_logit_bias_makes_a_token_certain(client: openai.OpenAI, name: str) -> None:
    options: Any = {"model": name, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    usual = client.completions.create(**options).choices[0].text
    biased = {client.completions.create(**options, logit_bias={str(t): 100}).choices[0].text for t in (1000, 2000)}
    assert len(biased | {usual}) == 3


def test_a_task_with_choices_is_answered_with_one_of_them(
    client: openai.OpenAI, name: str, daemon: DaemonProcess
) -> None:
    answer = client.chat.completions.create(model=name, messages=STORY, temperature=0, metadata={"task": "reviews"})
    assert answer.choices[0].message.content in ("yes", "no")
    assert answer.choices[0].finish_reason == "stop"
    assert daemon.inference(answer.id)["task"] == "reviews"


def test_models(client: openai.OpenAI, name: str, daemon: DaemonProcess) -> None:
    model = client.models.retrieve(name)
    assert model.id == name
    assert model.model_extra is not None
    about = model.model_extra["agentd"]
    assert (about["revision"], about["parent"], len(about["base_sha256"])) == (0, None, 64)
    with pytest.raises(openai.NotFoundError, match=name):
        client.models.retrieve("gpt-4")


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI, name: str) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=name, messages=HELLO, n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-4", messages=HELLO)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        create(model=name, messages=[{"role": "user", "content": "word " * 3000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as spoken:
        create(model=name, messages=HELLO, modalities=["text", "audio"])
    assert (spoken.value.status_code, spoken.value.code) == (400, "not_supported")
    with pytest.raises(openai.BadRequestError) as elsewhere:
        create(model=name, messages=HELLO, tools=[{"type": "custom", "custom": {"name": "f"}}])
    assert elsewhere.value.param is not None
    assert elsewhere.value.param.startswith("tools")


def test_an_error_before_the_first_token_of_a_stream_has_its_status(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "word " * 3000}], stream=True)


def test_eight_streams_at_once_each_get_their_own_answer(daemon: DaemonProcess) -> None:
    async def run() -> list[tuple[str, str, str | None]]:
        http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=str(daemon.api)))
        async with openai.AsyncOpenAI(base_url="http://agentd/v1", api_key="unused", http_client=http) as client:
            name = (await client.models.list()).data[0].id

            async def ask(i: int) -> tuple[str, str, str | None]:
                text, id, finish = "", "", None
                messages: list[Any] = [{"role": "user", "content": f"Count from {i} on."}]
                stream = await client.chat.completions.create(
                    model=name, messages=messages, max_tokens=12, temperature=0, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    id, finish = chunk.id, chunk.choices[0].finish_reason
                return id, text, finish

            return list(await asyncio.gather(*map(ask, range(8))))

    answers = asyncio.run(run())
    assert len({id for id, _, _ in answers}) == 8
    for i, (id, text, finish) in enumerate(answers):
        recorded = daemon.inference(id)
        assert recorded["input"]["messages"][0]["content"] == f"Count from {i} on."
        assert (recorded["output"], recorded["finish_reason"]) == (text, finish)
        alone = daemon.ask(f"Count from {i} on.", max_tokens=12).json["choices"][0]["message"]["content"]
        assert text == alone


def test_a_client_that_hangs_up_frees_its_slot_and_its_part_is_recorded(daemon: DaemonProcess) -> None:
    failed = daemon.status()["requests"]["failed"]
    body = {"messages": STORY, "max_tokens": 900, "temperature": 0}
    with streaming(daemon.api, "/v1/chat/completions", body) as events:
        seen = [next(events) for _ in range(5)]
    eventually(lambda: daemon.status()["requests"]["active"] == 0)
    recorded = daemon.inference(seen[0]["id"])
    assert recorded["finish_reason"] == "cancelled"
    assert recorded["output"].startswith("".join(chunk["choices"][0]["delta"]["content"] for chunk in seen))
    assert recorded["completion_tokens"] < 900
    assert daemon.status()["requests"]["failed"] == failed
    feedback = {"inference_id": seen[0]["id"], "kind": "boolean", "value": False}
    assert daemon.post("/v1/feedback", feedback).status == 201


def test_a_client_that_hangs_up_before_the_first_token_frees_its_slot(daemon: DaemonProcess) -> None:
    body = json.dumps({"messages": STORY, "max_tokens": 900, "stream": True}).encode()
    before = daemon.counts()["inferences"]
    for _ in range(2):
        with contextlib.closing(UnixConnection(daemon.api)) as connection:
            connection.request("POST", "/v1/chat/completions", body)
    eventually(lambda: daemon.status()["requests"]["active"] == 0, timeout=5)
    assert daemon.counts()["inferences"] - before <= 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(daemon: DaemonProcess) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--fail-with-body", "--max-time", "60", "--unix-socket", str(daemon.api), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    body = json.dumps({"messages": HELLO, "max_tokens": 4, "temperature": 0})
    url = "http://agentd/v1/chat/completions"
    answer = json.loads(curl(url, "-H", "Content-Type: application/json", "-d", body))
    assert answer["usage"]["completion_tokens"] == 4
    streamed = curl("-N", url, "-d", body[:-1] + ', "stream": true}').strip().split("\n\n")
    assert streamed[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in streamed[:-1])
    assert text == answer["choices"][0]["message"]["content"]
    assert json.loads(curl("http://agentd/health"))["status"] == "ok"


def test_agentctl_talks_to_the_same_daemon(daemon: DaemonProcess) -> None:
    def agentctl(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "agentd.ctl.app", *arguments, "--socket", str(daemon.admin)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    answer = agentctl("ask", "A fine film.", "--task", "reviews", "--temperature", "0")
    assert (answer.returncode, answer.stdout.strip() in ("yes", "no")) == (0, True)
    assert "--label" in answer.stderr
    feedback = agentctl("feedback", "add", "last", "--label", "yes")
    assert feedback.returncode == 0, feedback.stderr
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in agentctl("tasks").stdout.splitlines()}
    assert json.loads(rows["reviews"][0]) == ["yes", "no"]
    assert "state\tserving" in agentctl("status").stdout
