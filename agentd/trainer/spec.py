"""What the daemon asks the trainer to do: one JSON file, checked as a whole before anything is loaded."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from agentd.errors import TrainerFailed


class InvalidSpec(TrainerFailed):
    """Every mistake of a specification, reported at once."""

    def __init__(self, problems: list[str]) -> None:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        super().__init__("the trainer cannot use its specification: " + "; ".join(shown))
        self.problems = problems


@dataclass(frozen=True)
class Rows:
    """`n` rows of the tap from row `offset` on."""

    offset: int
    n: int


@dataclass(frozen=True)
class Term:
    """log p(token | sequence up to and including position), positions counted from the start of the prefix."""

    sequence: int
    position: int
    token: int


@dataclass(frozen=True)
class Example:
    """`number` is the engine's, -1 where the engine is not asked."""

    id: str
    dev: bool
    task: str
    sequences: tuple[Rows, ...]
    choices: tuple[tuple[Term, ...], ...]
    correct: int
    target: tuple[Term, ...]
    number: int = -1


@dataclass(frozen=True)
class TrainOptions:
    """Hyperparameters. `batch` counts examples; `patience` evaluations without improvement end the training.

    micro_tokens  tokens in a forward pass, padding and prefix included (budget/workload.py says how many)
    checkpoint    keep one block in memory at a time, and compute it again from its input for its gradient
    bf16          multiply matrices in bfloat16; sums, matrices that are trained and everything else stay float32
    first_step    steps that an earlier, parked training did
    """

    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 16
    max_epochs: int = 4
    patience: int = 2
    seed: int = 0
    threads: int = 2
    nll_weight: float = 0.1
    checkpoint: bool = False
    micro_tokens: int = 384
    bf16: bool = False
    first_step: int = 0


@dataclass(frozen=True)
class Spec:
    """Where the hidden states come from: the tap file has them already; or, with `tokens`, this process computes them
    for the token of every row; or, with `from_engine`, the engine does so step by step."""

    model: Path
    first_block: int
    end_block: int
    tap: Path
    n_embd: int
    prefix: Rows
    examples: tuple[Example, ...]
    train: TrainOptions
    initial: Path | None
    control: Path | None
    output: Path
    from_engine: bool = False
    tokens: tuple[int, ...] | None = None


_LEAST = {"rank": 1, "batch": 1, "max_epochs": 1, "patience": 1, "threads": 1, "seed": 0, "micro_tokens": 1}
_LEAST |= {"first_step": 0}
_POSITIVE = ("alpha", "lr")
_NOT_NEGATIVE = ("weight_decay", "nll_weight")


def read_spec(path: Path) -> Spec:
    """The specification in the JSON file `path`. Raises InvalidSpec with every mistake found."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSpec([f"{path}: {error.strerror or error}"]) from None
    except ValueError as error:
        raise InvalidSpec([f"{path} is no JSON: {error}"]) from None
    return parse_spec(data)


def parse_spec(data: Any) -> Spec:
    check = _Checker()
    top = check.object(
        data,
        "",
        required=("model", "first_block", "end_block", "tap", "prefix", "examples", "output"),
        optional=("train", "initial", "control", "from_engine", "tokens"),
    )
    tap = check.object(top.get("tap", {}), "tap", required=("path", "n_embd"))
    first = check.integer(top, "first_block", "first_block", 0)
    end = check.integer(top, "end_block", "end_block", 1)
    if end <= first:
        check.problem(f"end_block ({end}) is not above first_block ({first})")
    prefix = check.rows(top.get("prefix", {}), "prefix", least=0)
    listed = top.get("examples", [])
    if not isinstance(listed, list) or not listed:
        check.problem("examples must be a list with at least one example")
        listed = []
    examples = [check.example(item, f"examples[{i}]", prefix.n) for i, item in enumerate(listed)]
    if examples and all(example.dev for example in examples):
        check.problem("examples: every example is a dev example, so there is nothing to train on")
    spec = Spec(
        model=check.path(top, "model", "model"),
        first_block=first,
        end_block=end,
        tap=check.path(tap, "path", "tap.path"),
        n_embd=check.integer(tap, "n_embd", "tap.n_embd", 1),
        prefix=prefix,
        examples=tuple(examples),
        train=check.options(top.get("train", {})),
        initial=check.path(top, "initial", "initial") if top.get("initial") is not None else None,
        control=check.path(top, "control", "control") if top.get("control") is not None else None,
        output=check.path(top, "output", "output"),
        from_engine=check.flag(top, "from_engine", "from_engine"),
        tokens=check.tokens(top["tokens"], prefix, examples) if top.get("tokens") is not None else None,
    )
    if spec.tokens is not None and (spec.from_engine or not first):
        check.problem("tokens are of no use where the engine computes the states or there is no trunk")
    if spec.from_engine and any(example.number < 0 for example in spec.examples):
        check.problem("examples: the engine cannot be asked for one without its number")
    if check.problems:
        raise InvalidSpec(check.problems)
    return spec


class _Checker:
    """Collects problems and hands out harmless values in place of wrong ones, so that checking goes on."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def object(
        self, data: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        if not isinstance(data, dict):
            self.problem(f"{where or 'the specification'} must be an object")
            return {}
        dot = f"{where}." if where else ""
        for key in required:
            if key not in data:
                self.problem(f"{dot}{key} is missing")
        for key in data:
            if key not in required and key not in optional:
                self.problem(f"{dot}{key} is unknown")
        return data

    def value(
        self, data: dict[str, Any], key: str, where: str, good: Callable[[Any], bool], what: str, spare: Any
    ) -> Any:
        if key not in data:
            return spare
        if not good(data[key]):
            self.problem(f"{where} must be {what}, not {data[key]!r:.60}")
            return spare
        return data[key]

    def integer(self, data: dict[str, Any], key: str, where: str, least: int) -> int:
        good = lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least  # noqa: E731
        return int(self.value(data, key, where, good, f"a whole number from {least}", least))

    def number(self, data: dict[str, Any], key: str, where: str, positive: bool) -> float:
        def good(v: Any) -> bool:
            fine = isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf")
            return fine and not (positive and v == 0)

        return float(self.value(data, key, where, good, "a positive number" if positive else "a number from 0", 1.0))

    def flag(self, data: dict[str, Any], key: str, where: str) -> bool:
        return bool(self.value(data, key, where, lambda v: isinstance(v, bool), "true or false", False))

    def path(self, data: dict[str, Any], key: str, where: str) -> Path:
        return Path(self.value(data, key, where, lambda v: isinstance(v, str) and v != "", "a path", "."))

    def rows(self, data: Any, where: str, least: int) -> Rows:
        data = self.object(data, where, required=("offset", "n"))
        return Rows(self.integer(data, "offset", f"{where}.offset", 0), self.integer(data, "n", f"{where}.n", least))

    def tokens(self, data: Any, prefix: Rows, examples: list[Example]) -> tuple[int, ...]:
        if not isinstance(data, list) or not data or not all(type(token) is int and token >= 0 for token in data):
            self.problem("tokens must be a list of whole numbers from 0, one for every row of the tap")
            return ()
        rows = [prefix, *(rows for example in examples for rows in example.sequences)]
        if (end := max(each.offset + each.n for each in rows)) != len(data):
            self.problem(f"tokens has {len(data)}, and the prefix and the sequences go up to row {end}")
        return tuple(data)

    def terms(self, data: Any, where: str, lengths: list[int]) -> tuple[Term, ...]:
        if not isinstance(data, list) or not data:
            self.problem(f"{where} must be a list with at least one term")
            return ()
        out = []
        for i, term in enumerate(data):
            whole = isinstance(term, list) and len(term) == 3 and all(type(v) is int and v >= 0 for v in term)
            if not whole:
                self.problem(f"{where}[{i}] must be [sequence, position, token], not {term!r:.60}")
            elif term[0] >= len(lengths):
                self.problem(f"{where}[{i}]: there is no sequence {term[0]}, only {len(lengths)}")
            elif term[1] >= lengths[term[0]]:
                self.problem(f"{where}[{i}]: position {term[1]} is beyond the sequence's {lengths[term[0]]} tokens")
            else:
                out.append(Term(*term))
        return tuple(out)

    def example(self, data: Any, where: str, prefix: int) -> Example:
        keys = ("id", "sequences", "choices", "correct", "target")
        data = self.object(data, where, required=keys, optional=("dev", "task", "number"))
        listed = data.get("sequences", [])
        if not isinstance(listed, list) or not listed:
            self.problem(f"{where}.sequences must be a list with at least one sequence")
            listed = []
        sequences = [self.rows(item, f"{where}.sequences[{i}]", 1) for i, item in enumerate(listed)]
        lengths = [prefix + rows.n for rows in sequences]
        choices = data.get("choices", [])
        if not isinstance(choices, list) or len(choices) == 1:
            self.problem(f"{where}.choices must be a list of at least two choices, or empty for free text")
            choices = []
        correct = self.integer(data, "correct", f"{where}.correct", 0) if choices else 0
        if choices and correct >= len(choices):
            self.problem(f"{where}.correct is {correct}, and there are {len(choices)} choices")
        is_text = lambda v: isinstance(v, str)  # noqa: E731
        return Example(
            id=self.value(data, "id", f"{where}.id", is_text, "a text", "?"),
            dev=self.flag(data, "dev", f"{where}.dev"),
            task=self.value(data, "task", f"{where}.task", is_text, "a text", ""),
            sequences=tuple(sequences),
            choices=tuple(self.terms(c, f"{where}.choices[{i}]", lengths) for i, c in enumerate(choices)),
            correct=correct,
            target=self.terms(data.get("target"), f"{where}.target", lengths),
            number=self.integer(data, "number", f"{where}.number", 0) if "number" in data else -1,
        )

    def options(self, data: Any) -> TrainOptions:
        names = tuple(field.name for field in fields(TrainOptions))
        data = self.object(data, "train", required=(), optional=names)
        given: dict[str, Any] = {}
        for name in names:
            if name not in data:
                continue
            where = f"train.{name}"
            if name in _LEAST:
                given[name] = self.integer(data, name, where, _LEAST[name])
            elif name in _POSITIVE or name in _NOT_NEGATIVE:
                given[name] = self.number(data, name, where, positive=name in _POSITIVE)
            else:
                given[name] = self.flag(data, name, where)
        return TrainOptions(**given)
