"""Feedback and examples: what is accepted becomes an example at once, what is not leaves no trace."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import shared
from tools import tiny_model
from tools.daemon import Answer, DaemonProcess, UnixConnection, eventually, streaming


@pytest.fixture(scope="module")
def daemon(model_path: Path) -> DaemonProcess:
    return shared(model_path)


@pytest.fixture
def inference(daemon: DaemonProcess) -> str:
    id: str = daemon.ask("Is water wet?", max_tokens=1).json["id"]
    return id


def give(daemon: DaemonProcess, inference: str, kind: str, value: Any, **options: Any) -> Answer:
    return daemon.post("/v1/feedback", {"inference_id": inference, "kind": kind, "value": value, **options})


def send(daemon: DaemonProcess, *lines: Any) -> Answer:
    body = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return daemon.post("/v1/examples", body, headers={"Content-Type": "application/x-ndjson"})


def examples(daemon: DaemonProcess, task: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = daemon.get(f"/admin/examples?task={task}", admin=True).json["examples"]
    return rows


def test_every_served_request_is_recorded_with_its_revision_and_can_be_named(daemon: DaemonProcess) -> None:
    chat = daemon.ask("Say something.", max_tokens=3, seed=1, metadata={"task": "recorded", "who": "me"}).json
    text = daemon.post("/v1/completions", {"prompt": "One, two,", "max_tokens": 3, "temperature": 0}).json
    streamed = daemon.ask("Say more.", stream=True).body.decode()
    stream_id = json.loads(streamed.split("\n\n")[0][6:])["id"]
    for id, output in (
        (chat["id"], chat["choices"][0]["message"]["content"]),
        (text["id"], text["choices"][0]["text"]),
    ):
        row = daemon.inference(id)
        assert (row["revision"], row["output"], row["completion_tokens"]) == (0, output, 3)
        assert row["latency_ms"] >= row["ttft_ms"] > 0
    row = daemon.inference(chat["id"])
    assert (row["task"], row["kind"], row["params"]["seed"]) == ("recorded", "chat", 1)
    assert daemon.inference(text["id"])["input"] == {"prompt": "One, two,"}
    for id in (chat["id"], text["id"], stream_id):
        assert give(daemon, id, "boolean", True).status == 201


def test_an_answer_that_is_forgotten_while_it_streams_stays_so(daemon: DaemonProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 400, "logit_bias": {"2": -100}}
    with streaming(daemon.api, "/v1/chat/completions", body) as events:
        id = next(events)["id"]
        assert daemon.post("/admin/forget", {"inferences": [id]}, admin=True).json["inferences"] == 1
        *_, last = events
    assert (last["choices"][0]["finish_reason"], last["agentd"]["recorded"]) == ("length", False)
    assert daemon.get(f"/admin/inferences/{id}", admin=True).status == 404
    with streaming(daemon.api, "/v1/chat/completions", body) as events:
        id = next(events)["id"]
        assert daemon.post("/admin/forget", {"inferences": [id]}, admin=True).json["inferences"] == 1
    eventually(lambda: daemon.status()["requests"]["active"] == 0)  # who asked has left
    assert daemon.get(f"/admin/inferences/{id}", admin=True).status == 404


def test_feedback_may_come_while_the_answer_streams(daemon: DaemonProcess) -> None:
    connection = UnixConnection(daemon.api)
    body = {"messages": [{"role": "user", "content": "Count."}], "stream": True, "max_tokens": 400, "temperature": 1.5}
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**body, "seed": 3}), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    first = json.loads(response.readline()[6:])
    assert give(daemon, first["id"], "comment", "so far so good").status == 201
    assert daemon.inference(first["id"])["finish_reason"] == "streaming"
    rest = response.read().decode()
    connection.close()
    row = daemon.inference(first["id"])
    assert row["finish_reason"] in ("length", "stop")
    chunks = [json.loads(event[6:]) for event in rest.split("\n\n") if event.strip() and "[DONE]" not in event]
    spoken = first["choices"][0]["delta"].get("content", "")
    assert row["output"] == spoken + "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_each_kind_is_stored_as_it_came(daemon: DaemonProcess, inference: str) -> None:
    values: dict[str, Any] = {
        "label": "warm",
        "demonstration": "Yes, it is.",
        "boolean": False,
        "float": 0.25,
        "preference": {"chosen": "good", "rejected": "bad"},
        "comment": "Grüße 👋",
    }
    for kind, value in values.items():
        answer = give(daemon, inference, kind, value, metric=f"kinds-{kind}", source="program", tags={"a": "b"})
        assert answer.status == 201, answer.body
        listed = daemon.get(f"/admin/feedback?kind={kind}&task=kinds-{kind}", admin=True).json
        assert listed["total"] == 1
        row = listed["feedback"][0]
        assert (row["id"], row["value"], row["source"], row["tags"]) == (
            answer.json["id"],
            value,
            "program",
            {"a": "b"},
        )
        assert (answer.json["example_id"] is not None) == (kind in ("label", "demonstration", "preference"))
        # the answer was cut off after a token: how good it was teaches nothing


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("label", 1),
        ("label", ""),
        ("demonstration", None),
        ("boolean", 1),
        ("boolean", "true"),
        ("float", "0.5"),
        ("float", True),
        ("preference", "better"),
        ("preference", {"rejected": "bad"}),
        ("preference", {"chosen": "same", "rejected": "same"}),
        ("comment", {"deep": [1]}),
    ],
)
def test_a_value_that_does_not_fit_its_kind(daemon: DaemonProcess, inference: str, kind: str, value: Any) -> None:
    before = daemon.counts()
    answer = give(daemon, inference, kind, value)
    assert (answer.status, answer.error["param"]) == (400, "value")
    assert kind in answer.error["message"]
    assert daemon.counts() == before


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1" + "0" * 400, "NaN"])
def test_absurd_numbers(daemon: DaemonProcess, inference: str, value: str) -> None:
    before = daemon.counts()
    body = f'{{"inference_id": "{inference}", "kind": "float", "value": {value}}}'.encode()
    assert daemon.post("/v1/feedback", body).status == 400
    assert daemon.counts() == before


def test_an_unknown_inference(daemon: DaemonProcess) -> None:
    before = daemon.counts()
    answer = give(daemon, "chatcmpl-none", "label", "yes", task="reviews")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "chatcmpl-none" in answer.error["message"]
    assert daemon.counts() == before


def test_labels_outside_the_choices_and_of_free_text(daemon: DaemonProcess, inference: str) -> None:
    assert give(daemon, inference, "demonstration", "Wet.", task="prose").status == 201
    before = daemon.counts()
    outside = give(daemon, inference, "label", "maybe", task="reviews")
    assert (outside.status, outside.error["code"]) == (400, "label_not_in_choices")
    assert "'yes', 'no'" in outside.error["message"]
    free = give(daemon, inference, "label", "yes", task="prose")
    assert free.status == 400
    assert "demonstration" in free.error["message"]
    other = give(daemon, inference, "label", "yes", task="reviews", choices=["yes", "no", "maybe"])
    assert (other.status, other.error["code"]) == (409, "conflict")
    missing = give(daemon, inference, "label", "yes", task="fresh", choices=["a", "b"])
    assert (missing.status, missing.error["code"]) == (400, "label_not_in_choices")
    two = give(daemon, inference, "label", "yes", task="reviews", metric="prose")
    assert two.status == 400
    assert daemon.counts() == before


def test_feedback_declares_a_task_and_corrects_its_example(daemon: DaemonProcess, inference: str) -> None:
    first = give(daemon, inference, "label", "hot", task="weather", choices=["hot", "cold"]).json
    second = give(daemon, inference, "label", "cold", task="weather").json
    assert (first["created"], second["created"]) == (True, True)
    assert first["example_id"] == second["example_id"]
    assert [row["target"] for row in examples(daemon, "weather")] == ["cold"]
    tasks = {task["name"]: task for task in daemon.get("/admin/tasks", admin=True).json["tasks"]}
    assert (tasks["weather"]["choices"], tasks["weather"]["open"]) == (["hot", "cold"], False)


def test_labels_change_their_meaning_by_their_owners_word(daemon: DaemonProcess, inference: str) -> None:
    give(daemon, inference, "label", "soft", task="steel", choices=["hard", "soft"])

    def meaning(*arguments: str) -> str:
        command = [sys.executable, "-m", "agentd.ctl.app", "tasks", "meaning", *arguments, "--json"]
        done = subprocess.run([*command, "--socket", str(daemon.admin)], capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else f"{done.returncode} {done.stderr}"

    def state() -> str:
        (row,) = examples(daemon, "steel")
        return str(row["state"])

    assert json.loads(meaning("steel", "--since", "2999-12-31", "--label", "hard"))["set_aside"] == 0
    assert state() == "new"
    changed = json.loads(meaning("steel", "--since", "2999-12-31"))
    assert (changed["set_aside"], changed["task"]["meaning"]["since"]["soft"], state()) == (1, "2999-12-31", "stale")
    assert "labels changed" in {row["kind"] for row in daemon.get("/admin/events", admin=True).json["events"]}
    assert json.loads(meaning("steel", "--undo"))["readmitted"] == 1
    assert state() == "new"
    assert meaning("iron", "--undo").startswith("4 ")
    assert meaning("steel").startswith("2 ")
    for body in ({"since": "yesterday"}, {"since": "2026-01-01", "labels": ["blue"]}, {}):
        assert daemon.post("/admin/tasks/steel/meaning", body, admin=True).status == 400
    assert state() == "new"


@pytest.mark.parametrize("header", [False, True])
def test_an_idempotency_key_stores_once(daemon: DaemonProcess, inference: str, header: bool) -> None:
    key = f"key-{inference}"
    body = {"inference_id": inference, "kind": "float", "value": 1.5}
    headers = {"Idempotency-Key": key} if header else {}
    body |= {} if header else {"idempotency_key": key}
    first = daemon.post("/v1/feedback", body, headers=headers)
    before = daemon.counts()
    again = daemon.post("/v1/feedback", body, headers=headers)
    assert (first.status, again.status) == (201, 200)
    assert (again.json["id"], again.json["created"]) == (first.json["id"], False)
    other = daemon.post("/v1/feedback", {**body, "value": 2.5}, headers=headers)
    assert (other.status, other.error["code"]) == (409, "conflict")
    assert key in other.error["message"]
    assert daemon.counts() == before


def test_a_key_that_is_too_long(daemon: DaemonProcess, inference: str) -> None:
    body = {"inference_id": inference, "kind": "float", "value": 1.5}
    answer = daemon.post("/v1/feedback", body, headers={"Idempotency-Key": "k" * 201})
    assert (answer.status, answer.error["param"]) == (400, "idempotency_key")


def test_examples_are_counted_by_what_became_of_them(daemon: DaemonProcess) -> None:
    def line(i: int, label: str) -> dict[str, Any]:
        return {"task": "bulk", "messages": [{"role": "user", "content": f"number {i}"}], "label": label}

    first = send(daemon, *(line(i, "even" if i % 2 == 0 else "odd") for i in range(50)))
    assert first.json == {"added": 50, "replaced": 0, "unchanged": 0, "tasks": {"bulk": 50}}
    second = send(daemon, *(line(i, "even") for i in range(51)))
    assert second.json == {"added": 1, "replaced": 25, "unchanged": 25, "tasks": {"bulk": 51}}
    counts = daemon.get("/admin/examples?limit=1", admin=True).json["counts"]["bulk"]
    assert counts["train"]["new"] + counts["holdout"] == 51
    assert 0 < counts["holdout"] < 25


def test_each_form_of_an_example(daemon: DaemonProcess) -> None:
    answer = send(
        daemon,
        b"\xef\xbb\xbf" + b'{"task": "reviews", "text": "a fine film", "label": "yes"}',
        b"",
        {"task": "forms", "prompt": "raw ", "completion": "text"},
        b'  {"task": "forms", "messages": [{"role": "user", "content": "Hi"}], "completion": "Hello"}  \r',
    )
    assert answer.json["added"] == 3, answer.body
    (review,) = [row for row in examples(daemon, "reviews") if "a fine film" in json.dumps(row["input"])]
    assert review["input"]["messages"][0]["content"].startswith("Did the reviewer like this movie?")
    assert {row["kind"] for row in examples(daemon, "forms")} == {"demonstration"}


def test_conversations_with_calls_come_in_as_others_write_them_and_go_out_again(daemon: DaemonProcess) -> None:
    """OpenAI's fine-tuning files have ids and arguments as texts; TRL's have neither."""
    lamp = {"name": "lamp", "description": "", "parameters": {"type": "object", "properties": {"on": {}}}}
    called = {"name": "lamp", "arguments": {"on": True}}
    messages = [{"role": "system", "content": "You run a home."}, {"role": "user", "content": "Light the lamp, please"}]
    call = {"id": "x7", "type": "function", "function": {"name": "lamp", "arguments": '{"on":true}'}}
    done = {"role": "tool", "tool_call_id": "x7", "content": "ok"}
    openai = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}, done]
    trl = [*messages, {"role": "assistant", "tool_calls": [{"type": "function", "function": called}]}]
    tools = [{"type": "function", "function": lamp}]
    answer = send(
        daemon,
        {"task": "home", "messages": [*openai, {"role": "assistant", "content": "It is lit."}], "tools": tools},
        {"task": "trl", "messages": trl, "tools": json.dumps([lamp])},
        {"task": "split", "prompt": messages, "completion": trl[2:], "tools": tools},
        {"task": "alone", "messages": messages, "completion": {"role": "assistant", "content": "No lamp."}},
    )
    assert answer.json["tasks"] == {"home": 2, "trl": 1, "split": 1, "alone": 1}, answer.body
    rows = {task: examples(daemon, task) for task in ("home", "trl", "split", "alone")}
    assert sorted(row["kind"] for row in rows["home"]) == ["demonstration", "message"]
    targets = {row["target"] for task in ("home", "trl", "split") for row in rows[task] if row["kind"] == "message"}
    assert [json.loads(target)["tool_calls"][0]["function"] for target in targets] == [call["function"]]
    assert [row["target"] for row in rows["alone"]] == ["No lamp."]
    command = [sys.executable, "-m", "agentd.ctl.app", "feedback", "export", "--examples", "--task", "home"]
    lines = subprocess.run([*command, "--socket", str(daemon.admin)], capture_output=True, check=True).stdout
    again = daemon.post("/v1/examples", lines)
    assert (again.json["unchanged"], again.json["added"]) == (2, 0), again.body


def test_every_kind_of_example_goes_out_as_trainers_read_it_and_comes_in_again_as_it_was(daemon: DaemonProcess) -> None:
    """TRL's types of data sets: a conversation, a prompt with a pair, a prompt with an answer that was judged."""
    asked = [{"role": "user", "content": "Is it out?"}, {"role": "assistant", "content": "no"}]
    asked += [{"role": "user", "content": "And now?"}]
    lamp = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "lamp", "arguments": "{}"}}]}
    answer = send(
        daemon,
        {"task": "out-label", "messages": asked, "label": "yes"},
        {"task": "out-text", "messages": asked, "completion": "It is."},
        {"task": "out-pair", "messages": asked, "tools": [lamp], "chosen": [called], "rejected": "It is."},
        {"task": "out-thumb", "messages": asked, "completion": "It is.", "label": False},
        {"task": "out-score", "messages": asked, "completion": "It is.", "score": 0.5},
        {"task": "out-raw", "prompt": "It is ", "completion": "out."},
    )
    assert answer.status == 200, answer.body
    command = [sys.executable, "-m", "agentd.ctl.app", "feedback", "export", "--examples"]
    out = subprocess.run([*command, "--socket", str(daemon.admin)], capture_output=True, check=True).stdout.splitlines()
    lines = {line["task"]: line for line in map(json.loads, out) if line["task"].startswith("out-")}
    earlier = {"role": "assistant", "content": "no", "weight": 0}  # not to be learned
    said = {"role": "assistant", "content": "It is."}
    assert lines["out-label"] == {
        "task": "out-label",
        "messages": [asked[0], earlier, asked[2], {"role": "assistant", "content": "yes"}],
        "label": "yes",
    }
    assert lines["out-text"]["messages"] == [asked[0], earlier, asked[2], said]
    pair = lines["out-pair"]
    assert (pair["prompt"], pair["rejected"]) == (asked, [said])
    assert [call["function"]["name"] for call in pair["chosen"][0]["tool_calls"]] == ["lamp"]
    assert lines["out-thumb"] == {"task": "out-thumb", "prompt": asked, "completion": [said], "label": False}
    assert lines["out-score"] == {"task": "out-score", "prompt": asked, "completion": [said], "score": 0.5}
    assert lines["out-raw"] == {"task": "out-raw", "prompt": "It is ", "completion": "out."}
    again = daemon.post("/v1/examples", b"\n".join(out))
    assert (again.status, again.json["added"], again.json["replaced"]) == (200, 0, 0), again.body
    assert again.json["unchanged"] == len(out)


UNDECLARED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
GOOD = {"task": "broken", "prompt": "a", "label": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"task": "broken", "prompt": "b", "label"', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "must be a JSON object"),
        ({"task": "broken", "prompt": "b", "label": "x", "weight": 1}, "weight: unknown field"),
        ({"task": "broken", "prompt": "b"}, "give one of label, completion"),
        ({"task": "broken", "prompt": "b", "text": "b", "label": "x"}, "give one of messages, prompt, text"),
        ({"task": "broken", "prompt": "b", "label": ""}, "empty"),
        ({"task": "", "prompt": "b", "label": "x"}, "task"),
        ({"task": "reviews", "text": "b", "label": "maybe"}, "not one of the choices of task 'reviews': 'yes', 'no'"),
        ({"task": "prose-only", "prompt": "b", "label": "x"}, "free text"),
        ({"task": "broken", "messages": [{"role": "assistant", "content": "x"}]}, "is to be learned from"),
        ({"task": "broken", "messages": [{"role": "user", "content": "x"}, UNDECLARED]}, "did not declare"),
        ({"task": "broken", "prompt": "b", "completion": "c", "tools": "["}, "no JSON"),
        ({"task": "broken", "prompt": "\ud800", "label": "x"}, "surrogate"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_stored(daemon: DaemonProcess, line: Any, message: str) -> None:
    send(daemon, {"task": "prose-only", "prompt": "a", "completion": "b"})
    before = daemon.counts()
    answer = send(daemon, GOOD, b"", {**GOOD, "prompt": "c"}, line, GOOD)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_line", "line 4")
    assert answer.error["message"].startswith("line 4: ")
    assert message in answer.error["message"]
    assert "nothing of this file was stored" in answer.error["message"]
    assert daemon.counts() == before


def test_no_lines_at_all(daemon: DaemonProcess) -> None:
    for body in (b"", b"\n \n"):
        answer = send(daemon, body)
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")


def test_requests_are_answered_while_a_large_import_runs(daemon: DaemonProcess) -> None:
    lines = [json.dumps({"task": "large", "prompt": f"number {i}", "label": str(i % 2)}) for i in range(20_000)]
    slowest = 0.0
    importing = threading.Thread(target=lambda: send(daemon, "\n".join(lines).encode()))
    importing.start()
    while importing.is_alive():
        begin = daemon.cpu_seconds()
        assert daemon.get("/health").status == 200
        slowest = max(slowest, daemon.cpu_seconds() - begin)
    assert slowest < 0.5
    counts = daemon.get("/admin/examples?limit=1", admin=True).json["counts"]["large"]
    assert counts["train"]["new"] + counts["holdout"] == 20_000


STRICT = (
    "{% for message in messages %}"
    "{% if 'brief' in message['content'] %}{{ raise_exception('nothing brief') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}assistant: "
)


def test_an_example_that_the_template_cannot_render_is_refused_at_the_door(tmp_path: Path) -> None:
    said = {"role": "user", "content": "Is it blue?"}
    fine = {"messages": [said], "label": "yes", "task": "t"}
    wrong = {"messages": [{"role": "system", "content": "Be brief."}, said], "label": "no", "task": "t"}
    with DaemonProcess(tiny_model.write(tmp_path / "strict.gguf", template=STRICT)).start() as daemon:
        lines = [fine, {**fine, "messages": [{**said, "content": "Is it red?"}]}, wrong]
        refused = daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode())
        assert (refused.status, refused.error["code"]) == (400, "invalid_line")
        assert "line 3" in refused.error["message"]
        assert "nothing brief" in refused.error["message"]
        assert daemon.get("/admin/examples", admin=True).json["examples"] == []
        stored = daemon.post("/v1/examples", "\n".join(map(json.dumps, lines[:2])).encode())
        assert (stored.status, stored.json["added"]) == (200, 2)


def test_how_an_episode_came_out(daemon: DaemonProcess) -> None:
    steps = [daemon.ask(f"Step {i}.", max_tokens=1, metadata={"episode": "e1", "task": "ep"}).json for i in range(2)]
    body = {"episode": "e1", "kind": "boolean", "value": True, "idempotency_key": "e1 done"}
    answer = daemon.post("/v1/feedback", body)
    assert answer.status == 201, answer.body
    assert (answer.json["episode"], answer.json["steps"], answer.json["example_id"]) == ("e1", 2, None)
    assert answer.json["examples"] == sum(step["choices"][0]["finish_reason"] == "stop" for step in steps)
    assert (daemon.post("/v1/feedback", body).status, daemon.post("/v1/feedback", body).json["steps"]) == (200, 2)
    assert daemon.post("/v1/feedback", {**body, "episode": "e2", "idempotency_key": "e2"}).status == 404
    for wrong in ({**body, "inference_id": steps[0]["id"]}, {"kind": "boolean", "value": True}):
        assert daemon.post("/v1/feedback", wrong).status == 400


def test_judged_answers_and_pairs_come_in_the_form_of_trl(daemon: DaemonProcess) -> None:
    prompt = [{"role": "user", "content": "Hello?"}]
    said = {"role": "assistant", "content": "Hello."}
    lines = [
        {"task": "judged", "prompt": prompt, "chosen": [said], "rejected": [{**said, "content": "Hey."}]},
        {"task": "judged", "chosen": [*prompt, said], "rejected": [*prompt, {**said, "content": "Hey."}]},
        {"task": "judged", "prompt": "Hi. ", "completion": "Hello.", "label": False},
        {"task": "judged", "prompt": "Ho. ", "completion": "Hello.", "score": -2},
    ]
    answer = send(daemon, *lines)
    assert answer.status == 200, answer.body
    assert (answer.json["added"], answer.json["unchanged"]) == (3, 1)
    targets = {row["kind"]: json.loads(row["target"]) for row in examples(daemon, "judged")}
    assert targets == {
        "preference": {"chosen": "Hello.", "rejected": "Hey."},
        "thumb": {"answer": "Hello.", "good": False},
        "score": {"answer": "Hello.", "score": -2.0},
    }
    for wrong in (
        {"chosen": "a"},
        {"chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": ""},
        {"label": True},
        {"score": 1.0},
        {"completion": "a", "score": 1.0, "label": True},
        {"completion": "a", "chosen": "a", "rejected": "b"},
    ):
        assert send(daemon, {"task": "judged", "prompt": "x", **wrong}).status == 400, wrong
    assert send(daemon, {"task": "reviews", "prompt": "x", "completion": "yes", "label": True}).status == 400
