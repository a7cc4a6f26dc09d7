"""The Responses API over the socket: items, chains, events, and what is refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tools import tiny_model
from tools.daemon import Answer, DaemonProcess, exchange

PATH = "/v1/responses"
TWO = ["yes", "no"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    model = tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with DaemonProcess(model, {"serve": {"aliases": ["gpt-4o-mini"]}}) as process:
        process.start()
        yield process


def respond(daemon: DaemonProcess, **fields: Any) -> dict[str, Any]:
    answer = daemon.post(PATH, {"input": "hi", "choices": TWO, **fields})
    assert answer.status == 200, answer.body[:300]
    tree: dict[str, Any] = answer.json
    return tree


def said(tree: dict[str, Any]) -> str:
    (item,) = tree["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert part["type"] == "output_text"
    text: str = part["text"]
    return text


def events(daemon: DaemonProcess, **fields: Any) -> list[dict[str, Any]]:
    answer = daemon.post(PATH, {"input": "hi", "stream": True, **fields})
    assert answer.status == 200, answer.body[:300]
    stream = []
    for block in answer.body.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        stream.append(event)
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    return stream


def delete(daemon: DaemonProcess, id: str) -> Answer:
    return exchange(daemon.api, "DELETE", f"{PATH}/{id}")


def test_an_answer_and_what_it_repeats(daemon: DaemonProcess) -> None:
    sent = {"instructions": "Be brief.", "metadata": {"episode": "e1"}, "max_output_tokens": 9, "model": "gpt-4o-mini"}
    tree = respond(daemon, **sent)
    assert said(tree) in TWO
    assert tree["id"].startswith("resp_")
    assert tree["status"] == "completed"
    assert {name: tree[name] for name in sent} == sent
    assert tree["usage"]["total_tokens"] == tree["usage"]["input_tokens"] + tree["usage"]["output_tokens"]
    row = daemon.inference(tree["id"])
    assert (row["episode"], row["kind"], row["output"]) == ("e1", "response", said(tree))
    assert [message["role"] for message in row["input"]["messages"]] == ["system", "user"]
    feedback = {"inference_id": tree["id"], "kind": "label", "value": "yes", "choices": TWO, "task": "t"}
    assert daemon.post("/v1/feedback", feedback).status == 201
    assert delete(daemon, tree["id"]).status == 409


def test_it_is_shown_as_it_was_given_and_deleted(daemon: DaemonProcess) -> None:
    tree = respond(daemon)
    stored = daemon.get(f"{PATH}/{tree['id']}").json
    volatile = ("completed_at", "created_at")
    assert {k: v for k, v in stored.items() if k not in volatile} == {
        k: v for k, v in tree.items() if k not in volatile
    }
    assert abs(stored["created_at"] - tree["created_at"]) <= 1
    assert delete(daemon, tree["id"]).json["deleted"] is True
    assert daemon.get(f"{PATH}/{tree['id']}").status == 404
    assert delete(daemon, tree["id"]).status == 404
    chat = daemon.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "choices": TWO}).json
    assert daemon.get(f"{PATH}/{chat['id']}").status == 404


def test_a_chain_goes_on_with_what_was_said_but_not_with_its_instructions(daemon: DaemonProcess) -> None:
    first = respond(daemon, instructions="Be brief.")
    second = respond(daemon, input="and now?", previous_response_id=first["id"], instructions="Be kind.")
    row = daemon.inference(second["id"])
    assert row["input"]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": said(first)},
        {"role": "user", "content": "and now?"},
    ]
    stateless = [{"role": "user", "content": "hi"}, *first["output"], {"role": "user", "content": "and now?"}]
    again = respond(daemon, input=stateless, instructions="Be kind.")
    assert daemon.inference(again["id"])["input"] == row["input"]


def test_store_false_leaves_nothing(daemon: DaemonProcess) -> None:
    before = daemon.counts()["inferences"]
    tree = respond(daemon, store=False)
    assert events(daemon, choices=TWO, store=False)[-1]["response"]["agentd"]["recorded"] is False
    assert (tree["store"], tree["agentd"]["recorded"]) == (False, False)
    assert daemon.counts()["inferences"] == before
    assert daemon.get(f"{PATH}/{tree['id']}").status == 404
    answer = daemon.post(PATH, {"input": "x", "previous_response_id": tree["id"]})
    assert (answer.status, answer.error["code"]) == (400, "previous_response_not_found")
    assert answer.error["param"] == "previous_response_id"


def test_events_make_up_the_response(daemon: DaemonProcess) -> None:
    stream = events(daemon, temperature=0, max_output_tokens=5)
    kinds = [event["type"].removeprefix("response.") for event in stream]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    response = stream[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (item,) = response["output"]
    text = "".join(event["delta"] for event in stream[4:-4])
    assert item["content"][0]["text"] == text == stream[-4]["text"]
    assert stream[-2]["item"] == item
    assert (stream[0]["response"]["output"], stream[0]["response"]["status"]) == ([], "in_progress")
    whole = respond(daemon, choices=None, temperature=0, max_output_tokens=5)
    assert whole["output"][0]["content"] == item["content"]
    assert daemon.get(f"{PATH}/{response['id']}").json["output"] == response["output"]


def test_calls_and_results_of_a_history_reach_the_model(daemon: DaemonProcess) -> None:
    first = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "how warm?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {**first, "id": "fc_1", "status": "completed"},
        {**first, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "20"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "21"}]},
    ]
    row = daemon.inference(respond(daemon, input=history)["id"])
    user, assistant, *results = row["input"]["messages"]
    assert user == {"role": "user", "content": "how warm?"}
    assert assistant["reasoning_content"] == "Look."
    assert [call["id"] for call in assistant["tool_calls"]] == ["c1", "c2"]
    assert [(r["tool_call_id"], r["content"]) for r in results] == [("c1", "20"), ("c2", "21")]


def test_stored_items_stand_for_themselves(daemon: DaemonProcess) -> None:
    first = respond(daemon, input=[{"role": "user", "content": "hi"}], instructions="Be brief.")
    listed = daemon.get(f"{PATH}/{first['id']}/input_items").json
    (question,) = listed["data"]
    assert (question["role"], question["content"]) == ("user", [{"type": "input_text", "text": "hi"}])
    assert (listed["first_id"], listed["has_more"]) == (question["id"], False)
    references = [{"type": "item_reference", "id": question["id"]}, {"id": first["output"][0]["id"]}]
    second = respond(daemon, input=[*references, {"role": "user", "content": "and now?"}])
    messages = daemon.inference(second["id"])["input"]["messages"]
    assert [message["content"] for message in messages] == ["hi", said(first), "and now?"]
    path = f"{PATH}/{second['id']}/input_items"
    newest = [item["content"][0]["text"] for item in daemon.get(path).json["data"]]
    assert newest == ["and now?", said(first), "hi"]
    page = daemon.get(f"{path}?order=asc&limit=1").json
    assert (page["data"][0]["content"][0]["text"], page["has_more"]) == ("hi", True)
    rest = daemon.get(f"{path}?order=asc&after={page['last_id']}").json["data"]
    assert [item["role"] for item in rest] == ["assistant", "user"]
    assert respond(daemon, input=daemon.get(f"{path}?order=asc").json["data"])["status"] == "completed"
    assert daemon.get(f"{path}?after=msg_none").status == 400
    assert daemon.get(f"{PATH}/resp_none/input_items").status == 404


def test_only_what_runs_in_the_background_could_be_cancelled(daemon: DaemonProcess) -> None:
    refused = daemon.post(f"{PATH}/{respond(daemon)['id']}/cancel")
    assert (refused.status, "not a background response" in refused.error["message"]) == (400, True)
    assert daemon.post(f"{PATH}/resp_none/cancel").status == 404


def test_log_probabilities_of_the_text(daemon: DaemonProcess) -> None:
    options = {"choices": None, "temperature": 0, "max_output_tokens": 5}
    (item,) = respond(daemon, **options, top_logprobs=2)["output"]
    (part,) = item["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    (own,) = respond(daemon, **options, include=["message.output_text.logprobs"])["output"]
    assert [(entry["token"], entry["top_logprobs"]) for entry in own["content"][0]["logprobs"]] == [
        (entry["token"], []) for entry in part["logprobs"]
    ]
    seen = events(daemon, **options, top_logprobs=2)
    deltas = [event["logprobs"] for event in seen if event["type"] == "response.output_text.delta"]
    assert [entry for each in deltas for entry in each] == part["logprobs"]
    assert seen[-1]["response"]["output"][0]["content"][0]["logprobs"] == part["logprobs"]


def test_what_text_format_asks_for_is_obeyed(daemon: DaemonProcess) -> None:
    properties = {"ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    tree = respond(daemon, choices=None, text={"format": form, "verbosity": "low"}, max_output_tokens=200)
    assert isinstance(json.loads(said(tree))["ok"], bool)
    assert tree["text"]["format"] == form


def test_what_is_not_supported_is_said(daemon: DaemonProcess) -> None:
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}
    for fields, param in (
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [image]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"metadata": {"episode": ""}}, "metadata"),
        ({"temperature": 3}, "temperature"),
    ):
        answer = daemon.post(PATH, {"input": "x", **fields})
        assert (answer.status, answer.error["param"]) == (400, param), (fields, answer.body[:300])


def test_what_has_no_effect_is_named_in_a_header(daemon: DaemonProcess) -> None:
    answer = daemon.post(
        PATH, {"input": "x", "choices": TWO, "service_tier": "auto", "user": None, "include": ["other"]}
    )
    assert answer.headers["x-agentd-ignored"] == "user, service_tier, include"
    headers = {"x-agentd-episode": "e9"}
    row = daemon.inference(daemon.post(PATH, {"input": "x", "choices": TWO}, headers=headers).json["id"])
    assert row["episode"] == "e9"
    assert [r["id"] for r in daemon.get("/admin/inferences?episode=e9", admin=True).json["inferences"]] == [row["id"]]


def test_aliases(daemon: DaemonProcess) -> None:
    names = [model["id"] for model in daemon.get("/v1/models").json["data"]]
    assert names == ["tiny", "gpt-4o-mini"]
    chat = {"messages": [{"role": "user", "content": "a"}], "choices": TWO, "model": "gpt-4o-mini"}
    assert daemon.post("/v1/chat/completions", chat).json["model"] == "gpt-4o-mini"
    assert daemon.get("/v1/models/gpt-4o-mini").json["agentd"]["alias_of"] == "tiny"
    assert daemon.get("/v1/models/gpt-4").status == 404
