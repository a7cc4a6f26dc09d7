"""The user's agent: asks the model over the API with the stock OpenAI client, and sends back what was right."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai

TASK = "reviews"
_AT_ONCE = 4  # the daemon's slots


@dataclass(frozen=True)
class Answer:
    """What came back. Times in milliseconds, counted from the request."""

    id: str
    text: str
    revision: int
    ttft: float
    latency: float


class Agent:
    """One API socket. Every question is streamed and greedy, so that the same revision gives the same answer."""

    def __init__(self, socket: Path, prompt: str) -> None:
        self._prompt = prompt
        self._http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=str(socket)), timeout=120)
        self._openai = openai.AsyncOpenAI(
            base_url="http://agentd/v1", api_key="none", http_client=self._http, max_retries=0
        )

    async def close(self) -> None:
        await self._openai.close()

    async def ask(self, question: str, *, task: str | None = None, max_tokens: int = 24) -> Answer:
        """Streams an answer. Raises openai.OpenAIError."""
        start = time.perf_counter()
        first, text, id, revision = None, "", "", -1
        stream = await self._openai.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            metadata={"task": task} if task else openai.omit,
        )
        async for chunk in stream:
            id = chunk.id
            extra = chunk.model_extra or {}
            revision = extra.get("agentd", {}).get("revision", revision)
            delta = chunk.choices[0].delta.content if chunk.choices else None
            if delta:
                first = first or time.perf_counter()
                text += delta
        end = time.perf_counter()
        return Answer(id, text, revision, 1e3 * ((first or end) - start), 1e3 * (end - start))

    async def judge(self, review: str) -> Answer:
        """Did the reviewer like the movie? The task's choices restrict the answer."""
        return await self.ask(self._prompt.replace("{text}", review), task=TASK)

    async def judge_all(self, rows: Sequence[dict[str, Any]], tick: Callable[[], None]) -> list[Answer]:
        """The answers to all reviews, in their order."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(row: dict[str, Any]) -> Answer:
            async with gate:
                answer = await self.judge(row["text"])
            tick()
            return answer

        return list(await asyncio.gather(*(one(row) for row in rows)))

    async def correct(self, answer: Answer, label: str) -> None:
        """Tells the daemon what the right answer would have been."""
        body = {"inference_id": answer.id, "kind": "label", "value": label, "idempotency_key": f"demo-{answer.id}"}
        reply = await self._http.post("http://agentd/v1/feedback", json=body)
        reply.raise_for_status()

    async def import_examples(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sends feedback collected elsewhere, as JSONL."""
        lines = "\n".join(json.dumps({"task": TASK, "text": row["text"], "label": row["label"]}) for row in rows)
        reply = await self._http.post(
            "http://agentd/v1/examples", content=lines.encode(), headers={"Content-Type": "application/x-ndjson"}
        )
        reply.raise_for_status()
        return dict(reply.json())


def accuracy(answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> float:
    right: int = sum(answer.text == row["label"] for answer, row in zip(answers, rows, strict=True))
    return right / len(rows)
