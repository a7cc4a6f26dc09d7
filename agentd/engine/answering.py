"""Examples answered in the background, as they would be if they were asked: greedily, with the same constraints.

Serving's own code answers, in a context of the session (serving.py), so that what is judged is what is served.
"""

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentd.engine.process.wire import describe
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Generate, Piece, Sampling, Target
from agentd.engine.recalling import input_with_recalled
from agentd.engine.reply import Reply
from agentd.engine.response_format import FormatConstraint
from agentd.engine.serving import Serving
from agentd.engine.weight_registry import W
from agentd.errors import AgentdError, InvalidRequest

_MORE, _REASONING = 16, 256  # tokens beyond twice those of the right answer, and for a model that thinks before


@dataclass(frozen=True)
class Enough:
    """When as much is said as anyone wants to know: `text` tokens of text without a call, with `call` as soon as a tool
    is called. Reasoning is neither."""

    text: int | None = None
    call: bool = False


class Heard:
    """An answer as it comes."""

    def __init__(self, enough: Enough) -> None:
        self.reply, self._enough = Reply(), enough
        self._before: int | None = None  # tokens in front of its text

    def add(self, piece: Piece) -> bool:
        """Whether that is enough."""
        self.reply.add(piece)
        if self.reply.calls:
            return self._enough.call
        if self._before is None and self.reply.text.strip():
            self._before = piece.completion_tokens - 1
        spoken = 0 if self._before is None else piece.completion_tokens - self._before
        return self._enough.text is not None and spoken >= self._enough.text


def requests(source: Path, lines: Sequence[int], vocabulary: Prompts) -> Iterator[tuple[Generate, Enough]]:
    """What lines of a JSONL file ask for, in this order: {"input", "target"} as they are encoded; the input may have
    the request's `response_format` or `grammar` too, the line `choices` and what is `recalled` ({"turns", "tokens"}).
    An answer may have twice the tokens of the right one and a few more, or `max_tokens` where the line says so: one
    that is longer is wrong anyway. `enough`: see there."""
    numbers = set(lines)
    with source.open(encoding="utf-8", newline="\n") as file:
        trees = {number: json.loads(line) for number, line in enumerate(file) if number in numbers}
    for number in lines:
        tree = trees[number]
        input = dict(tree["input"])
        form = FormatConstraint.of(input.pop("response_format", None), input.pop("grammar", None))
        sampling = Sampling(temperature=0.0, grammar=form.grammar, json_schema=form.json_schema)
        limit = tree.get("max_tokens") or _limit(input, tree["target"], vocabulary)
        limit += _thoughts(input, vocabulary)
        request = Generate(str(number), input, sampling, limit, choices=tuple(tree.get("choices", ())))
        request = replace(request, input=input_with_recalled(vocabulary, input, tree.get("recalled")))
        yield request, Enough(**tree.get("enough", {}))


def answered(
    serving: Serving[W],
    requests: Sequence[Generate],
    step: Callable[[], list[Piece]],
    enough: Callable[[Piece], bool],
    *,
    at_once: int = 1,
    room: int = 0,
    needs: Callable[[Generate], int] = lambda request: 0,
) -> Iterator[list[Piece]]:
    """The pieces of every step; `step` takes one of `serving`. As many are answered `at_once` as fit into `room`, of
    which each `needs` a part."""
    waiting, running = deque(requests), dict[str, int]()
    try:
        while waiting or running:
            pieces: list[Piece] = []
            while waiting and len(running) < at_once:
                need = needs(waiting[0])
                if running and sum(running.values()) + need > room:
                    break
                request = waiting.popleft()
                try:
                    serving.submit(request)
                    running[request.key] = need
                except AgentdError as error:
                    pieces.append(Piece(request.key, error=describe(error)))
            for piece in step():
                over = piece.error is not None or enough(piece) or piece.finish is not None
                if over and piece.key in running:
                    del running[piece.key]
                    if piece.error is None and piece.finish is None:
                        serving.cancel(piece.key)
                        piece = replace(piece, finish="cut")
                pieces.append(piece)
            yield pieces
    finally:
        serving.close()


def _limit(input: dict[str, Any], target: Target, vocabulary: Prompts) -> int:
    if isinstance(target, str):
        return 2 * len(vocabulary.tokenize(target)) + _MORE
    if vocabulary.conversation is not None and "messages" in input:
        with contextlib.suppress(InvalidRequest):  # it is refused once more, when it is submitted
            return 2 * len(vocabulary.target(input, [], target)) + _MORE
    return 2 * len(vocabulary.tokenize(json.dumps(target, ensure_ascii=False))) + _MORE


def _thoughts(input: dict[str, Any], vocabulary: Prompts) -> int:
    if vocabulary.conversation is None or "messages" not in input:
        return 0
    quiet = (input.get("chat_template_kwargs") or {}).get("enable_thinking") is False
    return 0 if quiet or vocabulary.conversation.form.reasoning is None else _REASONING
