"""The agent that runs a home: what it is told goes to the model with the home's tools, and it does what that calls."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import home
from tools.demo.agent import Agent, Answer
from tools.demo.simulated_home import HomeError, SimulatedHome

_MAX_TOKENS = 48
_FEW_TOKENS = 16  # enough to see whether a call is made


@dataclass(frozen=True)
class Done:
    """`outcome` is what the home did, or what the model said instead."""

    answer: Answer
    outcome: str


class HomeAgent(Agent):
    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self.home = SimulatedHome()

    async def tell(self, text: str) -> Answer:
        """What the model makes of it; nothing is done yet."""
        return await self.ask(text, task=home.TASK, max_tokens=_MAX_TOKENS, tools=home.TOOLS, exact=False)

    async def tell_all(self, texts: Sequence[str], tick: Callable[[], None], *, exact: bool) -> list[Answer]:
        """The same for many, in their order."""
        return await self.ask_all(texts, tick, task=home.TASK, max_tokens=_MAX_TOKENS, tools=home.TOOLS, exact=exact)

    async def hear_all(self, texts: Sequence[str], tick: Callable[[], None]) -> list[Answer]:
        """How the answers to many begin, in their order."""
        return await self.ask_all(texts, tick, task=home.TASK, max_tokens=_FEW_TOKENS, tools=home.TOOLS, exact=False)

    async def act(self, text: str) -> Done:
        answer = await self.tell(text)
        outcomes = [self._run(call["function"]) for call in answer.calls]
        return Done(answer, "; ".join(outcomes) or answer.text.strip())

    async def teach(self, row: dict[str, Any]) -> bool:
        """Does what a row says; if that was not what is right, does it right and corrects the model. Whether it did."""
        done = await self.act(row["text"])
        if home.is_right(row, done.answer.calls):
            return False
        self.home.run(row["name"], row["arguments"])
        await self.correct(done.answer, "demonstration", home.answer(row))
        return True

    def _run(self, function: dict[str, Any]) -> str:
        try:
            return self.home.run(function["name"], json.loads(function["arguments"]))
        except (HomeError, ValueError) as error:
            return f"error: {error}"
