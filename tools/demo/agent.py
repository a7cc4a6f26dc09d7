"""A client of the daemon: asks over the API with the stock OpenAI client, and sends back what was right."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai

_AT_ONCE = 4  # the daemon's slots


@dataclass(frozen=True)
class Answer:
    """What came back: words, and calls as {"id", "type", "function": {"name", "arguments"}}. Times in milliseconds,
    counted from the request."""

    id: str
    text: str
    revision: int
    ttft: float
    latency: float
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def said(self) -> tuple[str, list[dict[str, Any]], int]:
        """What must be the same when the same revision is asked again."""
        return self.text, [call["function"] for call in self.calls], self.revision


class Agent:
    """One API socket. Every question is streamed and greedy."""

    def __init__(self, socket: Path) -> None:
        self._http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=str(socket)), timeout=120)
        self._openai = openai.AsyncOpenAI(
            base_url="http://agentd/v1", api_key="none", http_client=self._http, max_retries=0
        )

    async def close(self) -> None:
        await self._openai.close()

    async def ask(
        self,
        question: str,
        *,
        task: str | None = None,
        max_tokens: int = 24,
        tools: Sequence[dict[str, Any]] = (),
        tool_choice: str = "auto",
        exact: bool = True,
    ) -> Answer:
        """Streams an answer. Raises openai.OpenAIError.

        exact  the same answer in any company, for answers that are compared token for token: it is decoded alone, and a
               long prompt is computed again in part. Others share batches and what the cache has
        """
        start = time.perf_counter()
        first, text, id, revision = None, "", "", -1
        calls: dict[int, dict[str, Any]] = {}
        options: dict[str, Any] = {"tools": list(tools), "tool_choice": tool_choice} if tools else {}
        stream = await self._openai.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            seed=0 if exact else openai.omit,
            max_tokens=max_tokens,
            stream=True,
            metadata={"task": task} if task else openai.omit,
            **options,
        )
        async for chunk in stream:
            id = chunk.id
            extra = chunk.model_extra or {}
            revision = extra.get("agentd", {}).get("revision", revision)
            if not chunk.choices:
                continue
            delta = chunk.choices[0].delta
            if delta.content or delta.tool_calls:
                first = first or time.perf_counter()
            text += delta.content or ""
            for part in delta.tool_calls or ():
                call = calls.setdefault(part.index, {"id": "", "type": "function", "function": {}})
                call["id"] = part.id or call["id"]
                for name in ("name", "arguments"):
                    said = getattr(part.function, name, None) or ""
                    call["function"][name] = call["function"].get(name, "") + said
        end = time.perf_counter()
        return Answer(id, text, revision, 1e3 * ((first or end) - start), 1e3 * (end - start), list(calls.values()))

    async def ask_all(self, questions: Sequence[str], tick: Callable[[], None], **options: Any) -> list[Answer]:
        """The answers to all questions, in their order, some asked at the same time."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(question: str) -> Answer:
            async with gate:
                answer = await self.ask(question, **options)
            tick()
            return answer

        return list(await asyncio.gather(*(one(question) for question in questions)))

    async def correct(self, answer: Answer, kind: str, value: Any) -> None:
        """Tells the daemon what the right answer would have been."""
        body = {"inference_id": answer.id, "kind": kind, "value": value, "idempotency_key": f"demo-{answer.id}"}
        reply = await self._http.post("http://agentd/v1/feedback", json=body)
        reply.raise_for_status()

    async def import_examples(self, lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Sends feedback collected elsewhere, as JSONL."""
        body = "\n".join(map(json.dumps, lines))
        reply = await self._http.post(
            "http://agentd/v1/examples", content=body.encode(), headers={"Content-Type": "application/x-ndjson"}
        )
        reply.raise_for_status()
        return dict(reply.json())
