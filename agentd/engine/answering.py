"""Examples answered in the background, as they would be if they were asked: greedily, with the same constraints.

Serving's own code answers, in a context of the session (serving.py), so that what is judged is what is served.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentd.engine.process.wire import describe
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Generate, Piece, Sampling, Target
from agentd.engine.recalling import input_with_recalled
from agentd.engine.response_format import FormatConstraint
from agentd.engine.serving import Serving
from agentd.engine.weight_registry import W
from agentd.errors import AgentdError

_MORE, _REASONING = 16, 256  # tokens beyond twice those of the right answer, and for a model that thinks before


def requests(source: Path, lines: Sequence[int], vocabulary: Prompts) -> Iterator[Generate]:
    """What lines of a JSONL file ask for, in this order: {"input", "target"} as they are encoded; the input may have
    the request's `response_format` or `grammar` too, the line `choices` and what is `recalled` ({"turns", "tokens"}).
    An answer may have twice the tokens of the right one and a few more, or `max_tokens` where the line says so: one
    that is longer is wrong anyway."""
    numbers = set(lines)
    with source.open(encoding="utf-8", newline="\n") as file:
        trees = {number: json.loads(line) for number, line in enumerate(file) if number in numbers}
    for number in lines:
        tree = trees[number]
        input = dict(tree["input"])
        form = FormatConstraint.of(input.pop("response_format", None), input.pop("grammar", None))
        sampling = Sampling(temperature=0.0, grammar=form.grammar, json_schema=form.json_schema)
        limit = tree.get("max_tokens") or _limit(tree["target"], vocabulary)
        limit += _thoughts(input, vocabulary)
        request = Generate(str(number), input, sampling, limit, choices=tuple(tree.get("choices", ())))
        yield replace(request, input=input_with_recalled(vocabulary, input, tree.get("recalled")))


def answered(
    serving: Serving[W],
    requests: Sequence[Generate],
    step: Callable[[], list[Piece]],
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
            pieces += step()
            for piece in pieces:
                if piece.finish or piece.error:
                    running.pop(piece.key, None)
            yield pieces
    finally:
        serving.close()


def _limit(target: Target, vocabulary: Prompts) -> int:
    text = target if isinstance(target, str) else json.dumps(target, ensure_ascii=False)
    return 2 * len(vocabulary.tokenize(text)) + _MORE


def _thoughts(input: dict[str, Any], vocabulary: Prompts) -> int:
    if vocabulary.conversation is None or "messages" not in input:
        return 0
    quiet = (input.get("chat_template_kwargs") or {}).get("enable_thinking") is False
    return 0 if quiet or vocabulary.conversation.form.reasoning is None else _REASONING
