"""Ollama's API beside its own client (tests/system/clients): shapes of other programs, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Answer, DaemonProcess, exchange, shared

USER = {"role": "user", "content": "Say yes."}
SHORT = {"num_predict": 4, "temperature": 0, "seed": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "HassTurnOn",
        "description": "Turns on a device",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": ["lamp"]}, "area": {"enum": ["hall"]}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def daemon(model_path: Path) -> DaemonProcess:
    return shared(model_path)


def lines(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.body.splitlines()]


def failed(answer: Answer, status: int) -> str:
    assert answer.status == status, answer.body
    assert answer.json.keys() == {"error"}
    return str(answer.json["error"])


def test_home_assistants_conversation(daemon: DaemonProcess) -> None:
    """As its integration sends it: a float for num_ctx, keep_alive as a text, results that do not say of what."""
    name = daemon.get("/v1/models").json["data"][0]["id"]
    own: dict[str, Any] = {"model": name, "stream": True, "keep_alive": "-1s", "think": False}
    body: dict[str, Any] = {**own, "options": {"num_ctx": 8192.0}, "tools": [TOOL]}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a voice assistant for Home Assistant."},
        {"role": "user", "content": "Turn on the lamp", "images": []},
    ]
    forced = {"tool_choice": "required", "parallel_tool_calls": False}  # agentd's own: a small model needs to be told
    *_, call, end = lines(daemon.post("/api/chat", {**body, **forced, "messages": messages}))
    (called,) = call["message"]["tool_calls"]
    assert called["function"]["name"] == "HassTurnOn"
    assert called["function"]["arguments"]["name"] == "lamp"  # an object, no text
    assert (end["done"], end["done_reason"], end["message"]) == (True, "stop", {"role": "assistant", "content": ""})
    said = {"role": "assistant", "tool_calls": [{"function": called["function"]}]}
    messages += [said, {"role": "tool", "content": '{"success": true}'}]
    limited = {**body, "options": {"num_ctx": 8192.0, "num_predict": 4}, "tool_choice": "none", "messages": messages}
    answer = daemon.post("/api/chat", limited)
    *parts, end = lines(answer)
    assert end["done_reason"] in ("stop", "length")
    assert "options.num_ctx" in answer.headers["x-agentd-ignored"]
    stored = daemon.inference(end["agentd"]["id"])
    assert [message["role"] for message in stored["input"]["messages"]] == ["system", "user", "assistant", "tool"]
    (call,) = stored["input"]["messages"][2]["tool_calls"]
    assert stored["input"]["messages"][3]["tool_call_id"] == call["id"]
    assert json.loads(call["function"]["arguments"]) == called["function"]["arguments"]
    assert stored["output"] == "".join(part["message"]["content"] for part in parts)


def test_home_assistants_structured_task(daemon: DaemonProcess) -> None:
    properties = {"lit": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["lit"], "additionalProperties": False}
    body = {"model": "default", "messages": [USER], "format": schema, "keep_alive": -1, "options": {"num_predict": 50}}
    parts = lines(daemon.post("/api/chat", body))
    assert json.loads("".join(part["message"]["content"] for part in parts)).keys() == {"lit"}


def test_the_same_answer_in_either_api(daemon: DaemonProcess) -> None:
    """And in generate, whose prompt the template renders."""
    ours = daemon.ask("Say yes.").json["choices"][0]["message"]["content"]
    chat = daemon.post("/api/chat", {"model": "default", "messages": [USER], "stream": False, "options": SHORT}).json
    assert chat["message"]["content"] == ours
    made = daemon.post("/api/generate", {"prompt": "Say yes.", "stream": False, "options": SHORT}).json
    assert made["response"] == ours
    assert made["eval_count"] == 4
    assert made["done_reason"] == "length"
    assert made["total_duration"] >= made["prompt_eval_duration"] + made["eval_duration"] - 1
    assert made["prompt_eval_duration"] > 0
    parts = lines(daemon.post("/api/generate", {"prompt": "Say yes.", "options": SHORT}))
    assert "".join(part["response"] for part in parts) == ours
    with_system = {"prompt": "Say yes.", "system": "Be brief.", "stream": False, "options": SHORT}
    stored = daemon.inference(daemon.post("/api/generate", with_system).json["agentd"]["id"])
    assert [message["role"] for message in stored["input"]["messages"]] == ["system", "user"]


def test_raw_prompts_are_taken_as_they_are(daemon: DaemonProcess) -> None:
    prompt = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    raw = daemon.post("/api/generate", {"prompt": prompt, "raw": True, "stream": False, "options": SHORT}).json
    ours = daemon.post("/v1/completions", {"prompt": prompt, "special": True, "max_tokens": 4, "temperature": 0})
    assert raw["response"] == ours.json["choices"][0]["text"]
    refused = daemon.post("/api/generate", {"prompt": prompt, "raw": True, "system": "Be brief."})
    assert "raw takes the prompt as it is" in failed(refused, 400)


def test_what_an_answer_is_of_and_feedback_on_it(daemon: DaemonProcess) -> None:
    body = {"messages": [USER], "stream": False, "options": SHORT, "metadata": {"task": "reviews", "episode": "e1"}}
    answer = daemon.post("/api/chat", body).json
    assert answer["message"]["content"] in ("yes", "no")  # the task's choices
    said = {"inference_id": answer["agentd"]["id"], "kind": "label", "value": "yes"}
    assert daemon.post("/v1/feedback", said).status == 201
    gone = daemon.post("/api/chat", {**body, "store": False}).json
    assert gone["agentd"]["recorded"] is False


def test_an_empty_request_loads(daemon: DaemonProcess) -> None:
    loaded = daemon.post("/api/generate", {"model": "default"}).json
    assert (loaded["done"], loaded["done_reason"], loaded["response"]) == (True, "load", "")
    left = daemon.post("/api/chat", {"model": "default", "messages": [], "keep_alive": 0}).json
    assert (left["done_reason"], left["message"]["content"]) == ("unload", "")


def test_what_there_is(daemon: DaemonProcess) -> None:
    name = daemon.get("/v1/models").json["data"][0]["id"]
    (listed,) = daemon.get("/api/tags").json["models"]
    (running,) = daemon.get("/api/ps").json["models"]
    assert listed["model"] == listed["name"] == running["model"] == f"{name}:latest"
    assert listed["details"] == running["details"]
    assert listed["details"]["family"] == "llama"
    assert listed["details"]["format"] == "gguf"
    assert listed["size"] > 0
    for asked in ({"model": f"{name}:latest"}, {"name": name}, {"model": "default"}):
        shown = daemon.post("/api/show", asked).json
        assert "tools" in shown["capabilities"]
        assert "im_start" in shown["template"]
        assert shown["model_info"]["llama.embedding_length"] == daemon.status()["model"]["n_embd"]
    assert int(daemon.get("/api/version").json["version"].split(".")[1]) >= 12


def test_it_says_that_it_is_there_in_ollamas_words(daemon: DaemonProcess) -> None:
    """Ollama's own command asks for that before all else, by HEAD; a person with a browser is better off elsewhere."""
    there = daemon.get("/")
    assert (there.status, there.body) == (200, b"Ollama is running")
    assert there.headers["content-type"].startswith("text/plain")
    for path in ("/", "/api/tags", "/api/version"):
        head = exchange(daemon.api, "HEAD", path)
        assert (head.status, head.body) == (200, b"")
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    assert exchange(daemon.admin, "GET", "/", headers=browser).headers["location"] == "/ui/"
    assert exchange(daemon.api, "GET", "/", headers=browser).body == b"Ollama is running"  # has no dashboard


def test_vectors(daemon: DaemonProcess) -> None:
    ours = daemon.post("/v1/embeddings", {"input": ["one", "two"]}).json
    theirs = daemon.post("/api/embed", {"model": "default", "input": ["one", "two"], "truncate": True}).json
    assert theirs["embeddings"] == [row["embedding"] for row in ours["data"]]
    assert theirs["prompt_eval_count"] == ours["usage"]["prompt_tokens"]
    old = daemon.post("/api/embeddings", {"model": "default", "prompt": "one"}).json
    assert old["embedding"] == theirs["embeddings"][0]
    assert daemon.post("/api/embed", {"model": "default", "input": ""}).json["embeddings"] == []


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        ("chat", {"messages": [{**USER, "images": ["aGk="]}]}, "images is not supported"),
        ("generate", {"prompt": "a", "images": ["aGk="]}, "images is not supported"),
        ("generate", {"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ("generate", {"prompt": "a", "template": "{{ .Prompt }}"}, "template is not supported"),
        ("generate", {"prompt": "a", "context": [1, 2]}, "context is not supported"),
        ("chat", {"messages": [USER], "options": {"mirostat": 2}}, "mirostat is not supported"),
        ("chat", {"messages": [USER], "options": {"temperature": 9}}, "options.temperature: "),
        ("chat", {"messages": [USER], "options": {"num_predict": "many"}}, "options.num_predict"),
        ("chat", {"messages": [USER], "format": "xml"}, "format"),
        ("chat", {"messages": [{"role": "tool", "content": "1", "tool_name": "f"}]}, "answers no call before it"),
        ("chat", {"messages": [{"role": "king", "content": "1"}]}, "messages.0.role"),
        ("chat", {"messages": "hello"}, "messages"),
        ("embed", {"input": 5}, "input"),
        ("embed", {"input": "a", "dimensions": 3}, "dimensions"),
    ],
)
def test_what_is_refused(daemon: DaemonProcess, path: str, fields: dict[str, Any], reason: str) -> None:
    assert reason in failed(daemon.post(f"/api/{path}", {"model": "default", **fields}), 400)


def test_errors_have_ollamas_shape(daemon: DaemonProcess) -> None:
    for path in ("chat", "generate", "show", "embed"):
        assert "no model 'llama9:latest'" in failed(daemon.post(f"/api/{path}", {"model": "llama9:latest"}), 404)
    failed(daemon.post("/api/pull", {"model": "llama9"}), 404)
    failed(daemon.get("/api/chat"), 405)
    assert "not valid JSON" in failed(daemon.post("/api/chat", b"{"), 400)
    assert "web pages" in failed(daemon.post("/api/chat", {}, headers={"Origin": "https://evil.example"}), 403)


def test_neutral_values_and_nulls_ask_for_nothing(daemon: DaemonProcess) -> None:
    options: dict[str, Any] = {**SHORT, "mirostat": 0, "tfs_z": 1.0, "repeat_last_n": 64, "top_k": -1, "seed": -1}
    options |= {"num_gpu": 1, "use_mmap": None}
    body = {"messages": [USER], "options": options, "format": "", "images": [], "think": None, "stream": False}
    answer = daemon.post("/api/chat", {**body, "truncate": True})
    assert answer.status == 200
    ignored = answer.headers["x-agentd-ignored"]
    assert {"images", "truncate", "options.num_gpu", "options.use_mmap"} <= set(ignored.split(", "))
    unlimited = daemon.post("/api/chat", {**body, "options": {"num_predict": -1, "stop": ["e", "a", "i", "o", " "]}})
    assert unlimited.json["done_reason"] == "stop"
