"""The events of a response: what they add up to is what the response says."""

import json
from typing import Any

import pytest

from agentd.api.requests import validate
from agentd.api.response_body import ResponsesBody
from agentd.api.response_object import Events, output
from agentd.engine.protocol import CallDelta, Piece
from agentd.errors import InvalidRequest

CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "[1]"}},
]
PIECES = [
    Piece("k", reasoning="Let me"),
    Piece("k", reasoning=" see."),
    Piece("k", text="I "),
    Piece("k", text="look.", calls=(CallDelta(0, "c1", "f"),)),
    Piece("k", calls=(CallDelta(0, arguments="{}"), CallDelta(1, "c2", "g", "["))),
    Piece("k", calls=(CallDelta(1, arguments="1]"),), finish="tool_calls"),
]


def event_stream(*pieces: Piece, status: str = "completed") -> list[dict[str, Any]]:
    events = Events("resp_1")
    stream = [event for piece in pieces for event in events.piece(piece)]
    stream += events.end(status)
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    return stream


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (PIECES, ("Let me see.", "I look.", CALLS)),
        (PIECES[:2], ("Let me see.", "", [])),
        (PIECES[2:3], ("", "I ", [])),
        ([Piece("k", calls=(CallDelta(0, "c1", "f", "{}"),))], ("", "", CALLS[:1])),
        ([Piece("k", finish="stop")], ("", "", [])),
    ],
)
@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_items_of_events_are_those_of_the_response(pieces: list[Piece], said: Any, status: str) -> None:
    stream = event_stream(*pieces, status=status)
    done = [event["item"] for event in stream if event["type"] == "response.output_item.done"]
    reasoning, text, calls = said
    assert done == output("resp_1", reasoning, text, calls, status)
    added = [event["item"]["id"] for event in stream if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in done]
    deltas: dict[str, str] = {}
    for event in stream:
        if event["type"].endswith(".delta"):
            deltas[event["item_id"]] = deltas.get(event["item_id"], "") + event["delta"]
            assert done[event["output_index"]]["id"] == event["item_id"]
    for item in done:
        content = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert deltas.get(item["id"], "") == content


def test_what_cannot_be_read_is_named() -> None:
    for input, word in (
        ([{"type": "computer_call", "id": "x"}], "item_reference"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input_text"),
    ):
        with pytest.raises(InvalidRequest, match=word) as caught:
            validate(json.dumps({"input": input}).encode(), ResponsesBody)
        assert caught.value.param == "input"
