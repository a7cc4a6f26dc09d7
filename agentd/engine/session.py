"""The background commands of the engine process: a set of examples, and what a pass asks about them.

Every command is a generator: it yields progress (or None) where serving may cut in, and returns its result.
"""

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentd.engine.protocol import Background, Change, Encoded, InPlaceBackground, Rule, TapIndex
from agentd.errors import AgentdError, InvalidRequest, NotSupported

Steps = Generator[Any, None, Any]


class Session:
    def __init__(self, background: Background) -> None:
        self._background = background
        self._examples: list[Encoded] = []

    def encode(self, source: str, target: str) -> Steps:
        """Tokenises the examples of the JSONL file `source` ({"input", "choices", "target"} a line) into `target`.

        An example that cannot be used is written as {"error": reason}; it keeps its number and is never asked for.
        """
        self._examples = []
        # Lines end with \n alone: a text may hold any of the other line separators that splitlines() knows.
        with (
            Path(source).open(encoding="utf-8", newline="\n") as lines,
            Path(target).open("w", encoding="utf-8") as out,
        ):
            for number, line in enumerate(lines):
                example = json.loads(line)
                try:
                    encoded = self._background.encode(example["input"], example["choices"], example["target"])
                    out.write(json.dumps(asdict(encoded)) + "\n")
                except AgentdError as error:
                    encoded = Encoded([], [], 0, [])
                    out.write(json.dumps({"error": str(error)}) + "\n")
                self._examples.append(encoded)
                if number % 32 == 31:
                    yield number + 1
        return len(self._examples)

    def use(self, weights: str) -> Steps:
        self._background.use(weights)
        yield None

    def score(self, examples: Sequence[int]) -> Steps:
        """[{"choices": [log-likelihood...], "target": [log-likelihood...]}] in the order asked for."""
        by_length, back = _sorted(self._chosen(examples))
        scores: list[dict[str, Any]] = []
        for some in self._background.score(by_length):
            scores += [asdict(score) for score in some]
            yield len(scores)
        return [scores[i] for i in back]

    def tap(self, examples: Sequence[int], first: int, end: int, path: str) -> Steps:
        """Writes the inputs of blocks [first, end) and returns the index, sequences in the order asked for."""
        by_length, back = _sorted(self._chosen(examples))
        index: TapIndex | None = None
        for step in self._background.tap(by_length, range(first, end), Path(path)):
            if isinstance(step, TapIndex):
                index = step
            else:
                yield step
        assert index is not None
        sequences = [index.sequences[i] for i in back]
        return {**asdict(index), "sequences": sequences}

    def loss(self, examples: Sequence[int], nll_weight: float, seed: int, scale: float) -> Steps:
        chosen, _ = _sorted(self._chosen(examples))
        loss = None
        for value in self._background.loss(chosen, nll_weight, seed, scale):
            loss = value
            yield None
        return loss

    def update(self, seed: int, coefficient: float) -> Steps:
        self._background.update(seed, coefficient)
        yield None

    def pair(self, examples: Sequence[int], nll_weight: float, seed: int, epsilon: float) -> Steps:
        """The losses at both signs of a perturbation, of an engine that learns in place."""
        chosen, _ = _sorted(self._chosen(examples))
        both = None
        for value in self._learning().pair(chosen, nll_weight, seed, epsilon):
            both = value
            yield None
        return both

    def rule(self, change: dict[str, Any] | None = None, **rule: Any) -> Steps:
        self._learning().rule(Rule(**rule, change=Change(**change) if change else None))
        yield None

    def descend(self, examples: Sequence[int], nll_weight: float, seed: int, epsilon: float, lr: float) -> Steps:
        """A step of backpropagation, and the losses at both signs of a perturbation of the trunk."""
        chosen, _ = _sorted(self._chosen(examples))
        both = None
        for value in self._learning().descend(chosen, nll_weight, seed, epsilon, lr):
            both = value
            yield None
        return both

    def write_moved(self, path: str) -> Steps:
        self._learning().write_moved(Path(path))
        yield None

    def digest(self) -> Steps:
        yield None
        return self._learning().digest()

    def write_control(self, path: str) -> Steps:
        self._background.write_control(Path(path))
        yield None

    def drift(self, texts: Sequence[str], reference: str, candidate: str) -> Steps:
        drift = None
        for value in self._background.drift(texts, reference, candidate):
            drift = value
            yield None
        return drift

    def close(self) -> None:
        self._background.close()

    def _learning(self) -> InPlaceBackground:
        if not isinstance(self._background, InPlaceBackground):
            raise NotSupported("this engine does not learn in place")
        return self._background

    def _chosen(self, numbers: Sequence[int]) -> list[Encoded]:
        for number in numbers:
            if not 0 <= number < len(self._examples):
                raise InvalidRequest(f"the session has no example {number}")
            if not self._examples[number].sequences:
                raise InvalidRequest(f"example {number} could not be encoded")
        return [self._examples[number] for number in numbers]


def _sorted(examples: list[Encoded]) -> tuple[list[Encoded], list[int]]:
    """Examples by length, so that micro-batches are even, and for each original place its place there."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].n_tokens)
    back = [0] * len(order)
    for place, i in enumerate(order):
        back[i] = place
    return [examples[i] for i in order], back
