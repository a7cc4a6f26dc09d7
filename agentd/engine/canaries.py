"""Prompts that any usable set of weights answers: asked of a revision on trial, and of one that engines died under."""

import base64
import math
from collections.abc import AsyncIterator
from typing import Any, Protocol

from agentd.engine.protocol import Classification, Generate, ModelInfo, Piece, Sampling
from agentd.ids import uuid7

PROMPTS = ("Name a colour.", "What is two plus two?")


class Answering(Protocol):
    def generate(self, request: Generate) -> AsyncIterator[Piece]: ...

    async def classify(self, input: dict[str, Any]) -> Classification: ...


async def ask(engine: Answering, info: ModelInfo | None, prompt: str) -> None:
    """Has a prompt answered; a classifier gets an input of zeros. Raises ArithmeticError for probabilities that are no
    numbers, and what the engine raises."""
    if info is not None and info.input_shape is not None:
        answer = await engine.classify(zeros(info.input_shape))
        if not math.isclose(math.fsum(answer.probabilities), 1.0, abs_tol=1e-6):
            raise ArithmeticError("got probabilities that do not add up to one")
        return
    chat = info is not None and info.has_chat_template
    content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    request = Generate("canary-" + uuid7(), content, Sampling(temperature=0), max_tokens=4, logprobs=0)
    async for piece in engine.generate(request):
        for entry in piece.logprobs:
            if not entry["logprob"] > float("-inf"):
                raise ArithmeticError("gave probabilities that are not finite")


def zeros(shape: tuple[int, ...]) -> dict[str, Any]:
    """An input of zeros as it would be stored."""
    data = base64.b64encode(bytes(math.prod(shape))).decode()
    return {"array": {"dtype": "uint8", "shape": list(shape), "data": data}}
