"""The background operations of the engine process: a set of examples, and what a pass asks about them.

Every handler is a generator: it yields progress (or None) where serving may cut in, and returns its result.
"""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from agentd.engine.answering import Heard, requests
from agentd.engine.operations import (
    Answer,
    Answered,
    Descend,
    Digest,
    Drift,
    Encode,
    Loss,
    Operation,
    P,
    Pair,
    R,
    ScoreExamples,
    ScoreTexts,
    SetRule,
    Tap,
    Update,
    Use,
    WriteControl,
    WriteMoved,
)
from agentd.engine.protocol import Background, Generate, InPlaceBackground, Scores, TapIndex
from agentd.engine.recalling import input_with_recalled
from agentd.errors import AgentdError, InvalidRequest, NotSupported
from agentd.learn.encoded import Encoded

Steps = Generator[P | None, None, R]
"""Steps[type of progress, type of the result]."""

T = TypeVar("T")

_ENCODED = (
    "input",
    "choices",
    "target",
    "rejected",
    "objective",
    "weight",
    "whole",
)  # of an example, what its tokens depend on


class OperationSession:
    """Begins operations by their type; a subclass names its handlers with `on`."""

    def __init__(self) -> None:
        self._handlers: dict[type[Operation[Any, Any]], Callable[[Any], Steps[Any, Any]]] = {}

    def on(self, operation: type[Operation[R, P]], handler: Callable[[Any], Steps[P, R]]) -> None:
        self._handlers[operation] = handler

    def begin(self, operation: Operation[R, P]) -> Steps[P, R]:
        """Raises NotSupported for what this engine's sessions cannot do."""
        handler = self._handlers.get(type(operation))
        if handler is None:
            raise NotSupported(f"this engine's sessions have no operation {type(operation).__name__}")
        return handler(operation)

    def close(self) -> None:
        """Frees what the session holds."""


class Session(OperationSession):
    """Of a language model."""

    def __init__(self, background: Background) -> None:
        super().__init__()
        self._background = background
        self._examples: list[Encoded] = []
        self.on(Encode, self._encode)
        self.on(Use, lambda op: _at_once(lambda: background.use(op.weights)))
        self.on(ScoreExamples, self._score)
        self.on(Answer, self._answer)
        self.on(Tap, self._tap)
        self.on(Loss, lambda op: _last(background.loss(self._chosen(op.examples), op.nll_weight, op.seed, op.scale)))
        self.on(Update, lambda op: _at_once(lambda: background.update(op.seed, op.coefficient)))
        self.on(Drift, lambda op: _last(background.drift(op.texts, op.reference, op.candidate)))
        self.on(ScoreTexts, self._score_texts)
        self.on(WriteControl, lambda op: _at_once(lambda: background.write_control(op.path)))
        if isinstance(background, InPlaceBackground):
            self._learns_in_place(background)

    def _learns_in_place(self, background: InPlaceBackground) -> None:
        self.on(SetRule, lambda op: _at_once(lambda: background.rule(op.rule)))
        self.on(Pair, lambda op: _both(background.pair(self._chosen(op.examples), op.nll_weight, op.seed, op.epsilon)))
        self.on(
            Descend,
            lambda op: _both(background.descend(self._chosen(op.examples), op.nll_weight, op.seed, op.epsilon, op.lr)),
        )
        self.on(WriteMoved, lambda op: _at_once(lambda: background.write_moved(op.path)))
        self.on(Digest, lambda op: _at_once(background.digest))

    def _encode(self, op: Encode) -> Steps[int, int]:
        if not op.more:
            self._examples = []
        # Lines end with \n alone: a text may hold any of the other line separators that splitlines() knows.
        mode = "a" if op.more else "w"
        with op.source.open(encoding="utf-8", newline="\n") as lines, op.target.open(mode, encoding="utf-8") as out:
            for number, line in enumerate(lines):
                example = json.loads(line)
                try:
                    encoded = self._encoded(example)
                    out.write(json.dumps(asdict(encoded)) + "\n")
                except AgentdError as error:
                    encoded = Encoded.of([], [], 0, [])
                    out.write(json.dumps({"error": str(error)}) + "\n")
                self._examples.append(encoded)
                if number % 32 == 31:
                    yield number + 1
        return len(self._examples)

    def _encoded(self, example: dict[str, Any]) -> Encoded:
        """With what is recalled for it, where there is room for any of that. Raises AgentdError."""
        encode = self._background.encode
        fields = {name: example[name] for name in _ENCODED if name in example}
        if (recalled := example.get("recalled")) is not None:
            with contextlib.suppress(AgentdError):
                input = input_with_recalled(self._background.vocabulary, example["input"], recalled)
                return encode(**{**fields, "input": input})
        return encode(**fields)

    def _score(self, op: ScoreExamples) -> Steps[int, list[Scores]]:
        by_length, back = _sorted(self._numbered(op.examples))
        scores: list[Scores] = []
        for some in self._background.score(by_length):
            scores += some
            yield len(scores)
        return [scores[i] for i in back]

    def _score_texts(self, op: ScoreTexts) -> Steps[int, list[list[float]]]:
        """Messages and plain texts apart: what a template begins with is computed once."""
        templated = self._background.vocabulary.has_chat_template
        results: dict[int, list[float]] = {}
        for chat in (False, True):
            numbers = [n for n in range(len(op.prompts)) if (op.chat[n] and templated) == chat]
            if not numbers:
                continue
            encoded: list[Encoded] = []
            for n in numbers:
                message = {"messages": [{"role": "user", "content": op.prompts[n]}]}
                input = message if chat else {"prompt": op.prompts[n]}
                encoded.append(self._background.encode(input, op.answers[n], op.answers[n][0]))
                yield None
            by_length, back = _sorted(encoded)
            scores: list[Scores] = []
            for some in self._background.score(by_length):
                scores += some
                yield len(results) + len(scores)
            results |= {n: scores[place].choices for n, place in zip(numbers, back, strict=True)}
        return [results[n] for n in range(len(op.prompts))]

    def _answer(self, op: Answer) -> Steps[int, list[Answered | None]]:
        batch: list[Generate] = []
        heard: dict[str, Heard] = {}
        for request, enough in requests(op.source, op.lines, self._background.vocabulary):
            batch.append(request)
            heard[request.key] = Heard(enough)
            yield None
        ended: dict[str, Answered] = {}
        work = self._background.answer(batch, lambda piece: heard[piece.key].add(piece))
        spent = 0.0
        while spent < op.seconds:
            began, before = time.monotonic(), len(ended)
            pieces = next(work, None)
            if pieces is None:
                break
            for piece in pieces:
                if piece.finish or piece.error:
                    reply, whole = heard[piece.key].reply, piece.finish in ("stop", "tool_calls")
                    error = None if piece.error is None else str(piece.error["message"])
                    ended[piece.key] = Answered(reply.text, reply.calls, error, whole)
            spent += time.monotonic() - began
            yield len(ended) if len(ended) > before else None
        work.close()
        return [ended.get(request.key) for request in batch]

    def _tap(self, op: Tap) -> Steps[int, TapIndex]:
        by_length, back = _sorted(self._numbered(op.examples))
        index: TapIndex | None = None
        for step in self._background.tap(by_length, range(op.first, op.end), op.path):
            if isinstance(step, TapIndex):
                index = step
            else:
                yield step
        assert index is not None
        return TapIndex(index.n_embd, index.prefix_rows, index.rows, [index.starts[i] for i in back])

    def close(self) -> None:
        self._background.close()

    def _chosen(self, numbers: Sequence[int]) -> list[Encoded]:
        return _sorted(self._numbered(numbers))[0]

    def _numbered(self, numbers: Sequence[int]) -> list[Encoded]:
        for number in numbers:
            if not 0 <= number < len(self._examples):
                raise InvalidRequest(f"the session has no example {number}")
            if not self._examples[number].own:
                raise InvalidRequest(f"example {number} could not be encoded")
        return [self._examples[number] for number in numbers]


def _at_once(work: Callable[[], R]) -> Steps[None, R]:
    """The steps of what is not worth interrupting."""
    yield None
    return work()


def _last(values: Iterator[T | None]) -> Steps[None, T]:
    """The steps of what yields None where it may be interrupted, and its result at last."""
    result: T | None = None
    for value in values:
        result = value
        yield None
    assert result is not None
    return result


def _both(values: Iterator[tuple[float, ...] | None]) -> Steps[None, tuple[float, float]]:
    plus, minus = yield from _last(values)
    return plus, minus


def _sorted(examples: list[Encoded]) -> tuple[list[Encoded], list[int]]:
    """Examples by length, so that micro-batches are even, and for each original place its place there."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].n_tokens)
    back = [0] * len(order)
    for place, i in enumerate(order):
        back[i] = place
    return [examples[i] for i in order], back
