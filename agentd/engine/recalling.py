"""Past corrections as earlier turns of the conversation that they are recalled for, as many as there is room for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Generate, Recalled
from agentd.errors import InvalidRequest

_AMPLE = 1 << 30
_END = 4  # tokens that a choice may have more than by itself: its beginning, and the end of turn


def with_recalled(vocabulary: Prompts, request: Generate, limit: int) -> tuple[Generate, list[int], int]:
    """The request with what is recalled among its messages, its prompt's tokens, and how many corrections these have.
    `limit` is what a prompt and its answer may have together; the farthest are left out first, all of them where the
    model's template refuses such a conversation.

    Raises InvalidRequest where the request itself is none.
    """
    prompt, recalled = vocabulary.prompt(request.input), request.recalled
    if recalled is None or "messages" not in request.input:
        return request, prompt, 0
    room = min(recalled.tokens, limit - len(prompt) - _answer(vocabulary, request, limit - len(prompt)) - 1)
    n = len(recalled.turns)
    while n and room > 0:
        input = {**request.input, "messages": _inserted(request.input["messages"], recalled, n)}
        try:
            longer = vocabulary.prompt(input)
        except InvalidRequest:
            break
        if len(longer) - len(prompt) <= room:
            return replace(request, input=input), longer, n
        n -= 1
    return request, prompt, 0


def input_with_recalled(vocabulary: Prompts, input: dict[str, Any], recalled: dict[str, Any] | None) -> dict[str, Any]:
    """An example's input with {"turns", "tokens"} as `Recalled` has them; the context it is for holds any of these."""
    if recalled is None:
        return input
    request = Generate("", input, max_tokens=0, recalled=Recalled(**recalled))
    return with_recalled(vocabulary, request, _AMPLE)[0].input


def _answer(vocabulary: Prompts, request: Generate, left: int) -> int:
    """Tokens that are left to the answer; of what is `left` three quarters where the request names no limit."""
    if request.choices:
        return max(len(vocabulary.tokenize(choice)) for choice in request.choices) + _END
    return request.max_tokens if request.max_tokens < left else left * 3 // 4


def _inserted(messages: Sequence[dict[str, Any]], recalled: Recalled, n: int) -> list[dict[str, Any]]:
    """The `n` nearest behind the system's messages, the nearest of them last: next to what it is recalled for."""
    start = next(
        (i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), len(messages)
    )
    turns = [message for turn in reversed(recalled.turns[:n]) for message in turn]
    return [*messages[:start], *turns, *messages[start:]]
