"""One daemon with a tiny model, and what every client is to do with it.

The model's weights are random: what it has to say, it is made to say by a schema of few values or by tool_choice.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
import openai
from pydantic import BaseModel, ConfigDict

from tools.daemon import DaemonProcess

MODEL = "tiny"
RESULT = "21 degrees"
QUESTION = "How warm is it?"
SHORT: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


class Colour(BaseModel):
    """What structured output is asked for."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["red", "blue"]
    bright: bool


def warmth(room: Literal["bath", "kitchen"]) -> str:
    """How warm a room is."""
    assert room in ("bath", "kitchen")
    return RESULT


@dataclass(frozen=True)
class Place:
    """Where the daemon is reached: `over` is socket or tcp. `key` is asked for where the address is not loopback."""

    over: str
    daemon: DaemonProcess
    url: str
    key: str = "unused"
    opened: list[httpx2.Client] = field(default_factory=list)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.key, http_client=self.http(), max_retries=0)

    def asynchronous(self) -> openai.AsyncOpenAI:
        http = httpx2.AsyncClient(transport=self._transport(httpx2.AsyncHTTPTransport))
        return openai.AsyncOpenAI(base_url=self.url, api_key=self.key, http_client=http, max_retries=0)

    def http(self) -> httpx2.Client:
        """It is closed after the test."""
        self.opened.append(httpx2.Client(transport=self._transport(httpx2.HTTPTransport)))
        return self.opened[-1]

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()

    def _transport(self, kind: Any) -> Any:
        return kind(uds=str(self.daemon.api)) if self.over == "socket" else kind()

    def seen(self) -> dict[str, Any]:
        """The request that was answered last, as it is stored."""
        (row,) = self.daemon.get("/admin/inferences?limit=1", admin=True).json["inferences"]
        entry: dict[str, Any] = row
        return entry

    def looped(self) -> None:
        """The last request must be that after a call of `warmth`: with the call and its result."""
        messages = self.seen()["input"]["messages"]
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        assert [call["function"]["name"] for call in calls] == ["warmth"]
        (result,) = [message for message in messages if message["role"] == "tool"]
        assert result["tool_call_id"] == calls[0]["id"]
        assert RESULT in result["content"]
