"""A new revision serves on trial first: it is committed after a while without a failed check, else taken back."""

import asyncio
import time
from collections.abc import Callable

from agentd.config import Trial as TrialConfig
from agentd.engine.protocol import Generate, Sampling
from agentd.engine.supervisor import Supervisor
from agentd.errors import AgentdError
from agentd.ids import uuid7

_CANARIES = ("Name a colour.", "What is two plus two?")
_EVERY = 10.0  # seconds between checks
_PATIENCE = 30.0  # seconds a canary may take


class Trial:
    """Watches a revision. `run` returns None when it passed, or what went wrong."""

    def __init__(self, engine: Supervisor, config: TrialConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._config, self._clock = engine, config, clock
        self._ends = clock() + config.duration

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends - self._clock())

    async def run(self) -> str | None:
        restarts = self._engine.restarts
        while True:
            if problem := await self._check():
                return problem
            if self._engine.restarts != restarts:
                return "the engine died while the revision was on trial"
            if not self.seconds_left:
                return None
            await asyncio.sleep(min(_EVERY, self.seconds_left))

    async def _check(self) -> str | None:
        """Canary prompts must be answered, with finite probabilities."""
        for prompt in _CANARIES:
            try:
                await asyncio.wait_for(self._ask(prompt), _PATIENCE)
            except asyncio.TimeoutError:
                return f"the canary prompt {prompt!r} was not answered within {_PATIENCE:.0f} s"
            except AgentdError as error:
                return f"the canary prompt {prompt!r} failed: {error}"
            except ArithmeticError:
                return f"the canary prompt {prompt!r} gave probabilities that are not finite"
        return None

    async def _ask(self, prompt: str) -> None:
        chat = self._engine.info is not None and self._engine.info.has_chat_template
        content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        request = Generate("canary-" + uuid7(), content, Sampling(temperature=0), max_tokens=4, logprobs=0)
        async for piece in self._engine.generate(request):
            for entry in piece.logprobs:
                if not entry["logprob"] > float("-inf"):
                    raise ArithmeticError
