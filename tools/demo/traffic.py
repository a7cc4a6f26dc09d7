"""Other clients: one request every two seconds, and ten at once every twenty."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import anyio
import openai

from tools.demo.agent import Agent, Answer

EVERY = 2.0
BURST, BURST_EVERY = 10, 20.0
QUESTIONS = [
    "Name three things to pack for a rainy day.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Give me a synonym for happy.",
    "What do bees make?",
    "Why is the sky blue?",
    "Suggest a name for a dog.",
    "What is 7 plus 5?",
    "Translate good morning into French.",
]
LENGTH = 16  # tokens


@dataclass
class Traffic:
    """Runs while it is entered; what was answered, and what failed. `sparse` times as long between requests."""

    agent: Agent
    sparse: float = 1.0
    answers: list[tuple[str, Answer]] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)  # milliseconds to the first token, of single requests
    crowded: list[float] = field(default_factory=list)  # and of those that came ten at once
    failures: list[str] = field(default_factory=list)

    async def __aenter__(self) -> "Traffic":
        self._stopping = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Waits for the answers that are still under way."""
        self._stopping.set()
        await self._task

    @property
    def ttft(self) -> dict[str, float]:
        """Median milliseconds to the first token, by kind: over both together the median would lie in the gap."""
        return {"single": statistics.median(self.alone), "burst": statistics.median(self.crowded)}

    async def _run(self) -> None:
        running: set[asyncio.Task[None]] = set()
        start, number = time.monotonic(), count()
        for tick in count():
            n = BURST if tick * EVERY % BURST_EVERY == 0 else 1
            running |= {
                asyncio.create_task(self._one(QUESTIONS[next(number) % len(QUESTIONS)], n > 1)) for _ in range(n)
            }
            pause = start + (tick + 1) * EVERY * self.sparse - time.monotonic()
            try:
                with anyio.fail_after(max(0.0, pause)):
                    await self._stopping.wait()
                break
            except TimeoutError:
                running = {task for task in running if not task.done()}
        await asyncio.gather(*running)

    async def _one(self, question: str, crowded: bool) -> None:
        try:
            answer = await self.agent.ask(question, max_tokens=LENGTH)
            self.answers.append((question, answer))
            (self.crowded if crowded else self.alone).append(answer.ttft)
        except openai.OpenAIError as error:
            self.failures.append(f"{question}: {error}")


def contradictions(answers: Sequence[tuple[str, Answer]], reference: dict[tuple[int, str], str]) -> list[str]:
    """Answers that are not what the revision they name answers when it is asked alone."""
    return [
        f"{question!r}: revision {answer.revision} was named, and it answers {expected!r}, not {answer.text!r}"
        for question, answer in answers
        if (expected := reference.get((answer.revision, question))) != answer.text
    ]
