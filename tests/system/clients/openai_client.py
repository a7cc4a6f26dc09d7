"""openai: chat completions and responses."""

from typing import Any

from tests.system.clients.support import MODEL, QUESTION, RESULT, SHORT, Colour, Place

PARAMETERS: Any = {
    "type": "object",
    "properties": {"room": {"enum": ["bath", "kitchen"]}},
    "required": ["room"],
    "additionalProperties": False,
}
FUNCTION: Any = {"name": "warmth", "description": "How warm a room is.", "parameters": PARAMETERS, "strict": True}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
ASKED: Any = [{"role": "user", "content": QUESTION}]


class Chat:
    def plain(self, place: Place) -> None:
        with place.client() as client:
            answer = client.chat.completions.create(model=MODEL, messages=ASKED, **SHORT)
        assert answer.usage is not None
        assert answer.usage.completion_tokens

    def stream(self, place: Place) -> None:
        with place.client() as client, client.chat.completions.stream(model=MODEL, messages=ASKED, **SHORT) as events:
            kinds = {event.type for event in events}
        assert {"chunk", "content.delta"} <= kinds

    def tools(self, place: Place) -> None:
        for streamed in (False, True):
            with place.client() as client:
                messages: Any = list(ASKED)
                options: Any = {"model": MODEL, "tools": TOOLS, "parallel_tool_calls": False, "temperature": 0}
                if streamed:
                    with client.chat.completions.stream(messages=messages, tool_choice="required", **options) as events:
                        message: Any = events.get_final_completion().choices[0].message
                else:
                    whole = client.chat.completions.create(messages=messages, tool_choice="required", **options)
                    assert whole.choices[0].finish_reason == "tool_calls"
                    message = whole.choices[0].message
                (call,) = message.tool_calls
                messages += [message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
                client.chat.completions.create(messages=messages, tool_choice="none", **options | SHORT)
                place.looped()

    def structured(self, place: Place) -> None:
        with place.client() as client:
            answer = client.chat.completions.parse(
                model=MODEL, messages=ASKED, response_format=Colour, temperature=0, max_tokens=200
            )
        assert isinstance(answer.choices[0].message.parsed, Colour)

    def turns(self, place: Place) -> None:
        messages: Any = list(ASKED)
        with place.client() as client:
            for _ in range(3):
                answer = client.chat.completions.create(model=MODEL, messages=messages, **SHORT)
                messages += [answer.choices[0].message, {"role": "user", "content": "And then?"}]
        assert len(place.seen()["input"]["messages"]) == 5


SHORT_RESPONSE: dict[str, Any] = {"model": MODEL, "max_output_tokens": 6, "temperature": 0}


class Responses:
    def plain(self, place: Place) -> None:
        with place.client() as client:
            answer = client.responses.create(input=QUESTION, **SHORT_RESPONSE)
            assert answer.usage is not None
            assert client.responses.retrieve(answer.id).output_text == answer.output_text

    def stream(self, place: Place) -> None:
        with place.client() as client, client.responses.stream(input=QUESTION, **SHORT_RESPONSE) as events:
            kinds = {event.type for event in events}
        assert {"response.created", "response.output_text.delta", "response.incomplete"} <= kinds

    def tools(self, place: Place) -> None:
        tools = [{"type": "function", **FUNCTION}]
        options: Any = {"model": MODEL, "tools": tools, "parallel_tool_calls": False, "temperature": 0}
        for streamed in (False, True):
            with place.client() as client:
                said: Any = list(ASKED)
                if streamed:
                    with client.responses.stream(input=said, tool_choice="required", **options) as events:
                        answer: Any = events.get_final_response()
                else:
                    answer = client.responses.create(input=said, tool_choice="required", **options)
                (call,) = [item for item in answer.output if item.type == "function_call"]
                result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
                again: Any = {**options, "max_output_tokens": 6, "tool_choice": "none"}
                client.responses.create(input=[*said, *answer.output, result], store=True, **again)
                place.looped()
                chained: Any = [result]
                client.responses.create(input=chained, previous_response_id=answer.id, **again)
                place.looped()

    def structured(self, place: Place) -> None:
        with place.client() as client:
            answer = client.responses.parse(input=QUESTION, model=MODEL, text_format=Colour, temperature=0)
        assert isinstance(answer.output_parsed, Colour)

    def turns(self, place: Place) -> None:
        previous: Any = None
        with place.client() as client:
            for _ in range(3):
                answer = client.responses.create(input="And then?", previous_response_id=previous, **SHORT_RESPONSE)
                previous = answer.id
        assert len(place.seen()["input"]["messages"]) == 5
