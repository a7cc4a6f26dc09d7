"""What the daemon asks the trainer to do: one JSON file, checked as a whole before anything is loaded.

Plain dataclasses: a validation library would be a tenth of what this process has before it begins.
"""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from agentd.errors import TrainerFailed
from agentd.learn.encoded import METRIC, OBJECTIVES, PREFERENCE, Encoded
from agentd.learn.step_size import WEIGHT_DECAY
from agentd.trainer.batches import Example

STATES = ("tapped", "computed", "asked")

T = TypeVar("T")


class InvalidSpec(TrainerFailed):
    """Every mistake of a specification, reported at once."""

    def __init__(self, problems: list[str]) -> None:
        listed = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        super().__init__("the trainer cannot use its specification: " + "; ".join(listed))
        self.problems = problems


def _number(default: float, *, least: float = 0, above: float = -math.inf) -> Any:
    return field(default=default, metadata={"least": least, "above": above})


@dataclass(frozen=True)
class TrainOptions:
    """Hyperparameters. `batch` counts examples; `patience` evaluations without improvement end the training.

    micro_tokens  tokens in a forward pass, padding and prefix included (budget/workload.py says how many)
    checkpoint    keep one block in memory at a time, and compute it again from its input for its gradient
    streamed      leave the blocks' matrices in the file, and make a part of one whenever it is multiplied
    bf16          multiply matrices in bfloat16; sums, matrices that are trained and everything else stay float32
    first_step    steps that an earlier, parked training did
    seconds       from the start of this process until training ends: fewer steps are taken where all take longer
    park_every    seconds between two times that the state is written, at least
    """

    rank: int = _number(8, least=1)
    alpha: float = _number(16.0, above=0)
    lr: float = _number(1e-3, above=0)
    weight_decay: float = _number(WEIGHT_DECAY)
    batch: int = _number(16, least=1)
    max_epochs: int = _number(4, least=1)
    patience: int = _number(2, least=1)
    seed: int = _number(0)
    threads: int = _number(2, least=1)
    nll_weight: float = _number(0.1)
    checkpoint: bool = False
    streamed: bool = False
    micro_tokens: int = _number(384, least=1)
    bf16: bool = False
    first_step: int = _number(0)
    seconds: float = _number(86400.0)
    park_every: float = _number(45.0)


@dataclass(frozen=True)
class Spec:
    """One training.

    tap      the file of hidden states that enter the first trained block
    states   where they come from: the engine has `tapped` them already; they are `computed` here, once; or the engine
             is `asked` for them in every step
    encoded  the engine's file of examples, one a line, the first is number 0
    train    numbers of the examples to learn from, `dev` of those that judge
    prefix   tokens that all of them begin with, rows of the tap that are there once
    starts   where `tapped`: the first row of each example, first those of `train`, then those of `dev`
    groups   of each example, first those of `train`, then those of `dev`, which group it is wrong as often as
             (learn/label_noise.py); 0: it is never wrong. May be left out
    parking  the file that the training's state is written to, see parking.py; None: it is lost with the process
    goes_on  it begins where that file says, if it belongs to the same training
    identity what that depends on besides, in a word
    context  what whoever reads the file's header finds there
    """

    model: Path
    first_block: int = field(metadata={"least": 0})
    end_block: int = field(metadata={"least": 1})
    tap: Path
    encoded: Path
    train: list[int]
    output: Path
    dev: list[int] = field(default_factory=list)
    states: str = "tapped"
    prefix: int = _number(0)
    starts: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    initial: Path | None = None
    control: Path | None = None
    parking: Path | None = None
    goes_on: bool = False
    identity: str = ""
    context: dict[str, Any] = field(default_factory=dict)
    options: TrainOptions = field(default_factory=TrainOptions)
    examples: tuple[Example, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong although every field is of its type."""
        messages = []
        if self.end_block <= self.first_block:
            messages.append(f"end_block ({self.end_block}) is not above first_block ({self.first_block})")
        if not self.train:
            messages.append("train is empty, so there is nothing to train on")
        if self.states not in STATES:
            messages.append(f"states must be one of {', '.join(STATES)}, not {self.states!r:.60}")
        if self.states == "computed" and not self.first_block:
            messages.append("states cannot be computed where there is no trunk")
        if self.states == "tapped" and len(self.starts) != len(self.train) + len(self.dev):
            messages.append(f"starts has {len(self.starts)} rows for {len(self.train) + len(self.dev)} examples")
        if self.groups and len(self.groups) != len(self.train) + len(self.dev):
            messages.append(f"groups has {len(self.groups)} for {len(self.train) + len(self.dev)} examples")
        return messages


def read_spec(path: Path) -> Spec:
    """The specification in the JSON file `path`, with its examples. Raises InvalidSpec with every mistake found."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSpec([f"{path}: {error.strerror or error}"]) from None
    except ValueError as error:
        raise InvalidSpec([f"{path} is no JSON: {error}"]) from None
    return parse_spec(tree)


def parse_spec(tree: Any) -> Spec:
    """Raises InvalidSpec."""
    problems: list[str] = []
    values = _values(Spec, tree, "", problems)
    values["options"] = TrainOptions(**_values(TrainOptions, values.get("options", {}), "options.", problems))
    if not problems:
        spec = Spec(**values)
        problems = spec.problems()
    if not problems:
        spec = Spec(**values, examples=tuple(_examples(spec, problems)))
    if problems:
        raise InvalidSpec(problems)
    return spec


def _examples(spec: Spec, problems: list[str]) -> list[Example]:
    """Those of `train`, then those of `dev`."""
    numbers = [*spec.train, *spec.dev]
    line_numbers, lines = set(numbers), {}
    try:
        with spec.encoded.open(encoding="utf-8") as file:
            lines = {number: line for number, line in enumerate(file) if number in line_numbers}
    except OSError as error:
        problems.append(f"encoded: {spec.encoded}: {error.strerror or error}")
        return []
    examples = []
    for i, number in enumerate(numbers):
        where = f"encoded: {spec.encoded}: example {number}"
        try:
            encoded = Encoded.from_json(json.loads(lines[number]))
            if trouble := _trouble(encoded, spec.prefix):
                problems.append(f"{where} {trouble}")
            examples.append(Example(number, encoded, dev=i >= len(spec.train)))
        except KeyError:
            problems.append(f"{where} is not there")
        except (TypeError, ValueError) as error:
            problems.append(f"{where} is none: {error}")
    return examples


def _trouble(encoded: Encoded, prefix: int) -> str | None:
    lengths = [len(encoded.shared) + len(own) for own in encoded.own]
    if not lengths or not encoded.target:
        return "has nothing that could be scored"
    if prefix > len(encoded.shared):
        return f"begins with {len(encoded.shared)} shared tokens, and the prefix has {prefix}"
    if encoded.choices and not 0 <= encoded.correct < len(encoded.choices):
        return f"says that choice {encoded.correct} is right, and there are {len(encoded.choices)}"
    if encoded.objective not in OBJECTIVES or not 0 < encoded.weight < math.inf:
        return f"has the objective {encoded.objective!r:.60} of weight {encoded.weight}"
    if encoded.objective == METRIC:
        return "learns its metric, which has no derivative"
    if encoded.objective == PREFERENCE and not (len(encoded.choices) == 2 and all(encoded.choices)):
        return "is a preference and has not two answers"
    for sequence, position, token in encoded.terms:
        if not 0 <= sequence < len(lengths) or not 0 <= position < lengths[sequence] or token < 0:
            return f"scores token {token} at position {position} of sequence {sequence}, which is not there"
    return None


def _values(cls: type[Any], tree: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """The fields of `cls` that the JSON object `tree` has, each of its type and within its bounds."""
    if not isinstance(tree, dict):
        problems.append(f"{where.rstrip('.') or 'the specification'} must be an object")
        return {}
    known = {each.name: each for each in fields(cls) if each.name != "examples"}
    problems += [f"{where}{name} is unknown" for name in tree if name not in known]
    values: dict[str, Any] = {}
    for name, each in known.items():
        if name not in tree:
            if each.default is MISSING and each.default_factory is MISSING:
                problems.append(f"{where}{name} is missing")
            continue
        what, good, convert = _kind(get_type_hints(cls)[name])
        value, bounds = tree[name], each.metadata
        if good(value) and (not bounds or (value >= bounds["least"] and value > bounds.get("above", -math.inf))):
            values[name] = convert(value)
            continue
        least = f" from {bounds['least']:g}" if bounds and bounds.get("above", -math.inf) < 0 else ""
        above = f" above {bounds['above']:g}" if bounds and bounds.get("above", -math.inf) >= 0 else ""
        problems.append(f"{where}{name} must be {what}{least}{above}, not {value!r:.60}")
    return values


def _kind(hint: Any) -> tuple[str, Callable[[Any], bool], Callable[[Any], Any]]:
    """What a field of this type is called, whether a JSON value is one, and the value itself."""
    if isinstance(hint, UnionType):
        what, good, convert = _kind(next(each for each in get_args(hint) if each is not NoneType))
        return (
            f"{what} or null",
            lambda v: v is None or good(v),
            lambda v: None if v is None else convert(v),
        )
    return {
        int: ("a whole number", lambda v: type(v) is int, int),
        float: ("a number", lambda v: type(v) in (int, float) and math.isfinite(v), float),
        bool: ("true or false", lambda v: type(v) is bool, bool),
        str: ("a text", lambda v: type(v) is str, str),
        Path: ("a path", lambda v: type(v) is str and v != "", Path),
        list[int]: (
            "a list of whole numbers from 0",
            lambda v: type(v) is list and all(type(n) is int and n >= 0 for n in v),
            list,
        ),
        dict[str, Any]: ("an object", lambda v: type(v) is dict, dict),
        TrainOptions: ("an object", lambda v: type(v) is dict, dict),
    }[hint]
