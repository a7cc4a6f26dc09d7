"""Every command that the daemon gives its engine process, as a type: the fields are its arguments, the parameters what
it returns and what it reports on the way. engine/process/wire.py carries them; nothing else knows how.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from agentd.engine.protocol import Classification, Generate, LearningRule, Scores, TapIndex, Weights

R = TypeVar("R")
P = TypeVar("P")


class Lane(Enum):
    """When an operation's turn comes. URGENT interrupts background work; SOON is answered between forward passes:
    who only looks must not hold up the work; LATER is background work itself, one after the other."""

    URGENT = 1
    SOON = 2
    LATER = 3


class Operation(Generic[R, P]):
    lane: ClassVar[Lane] = Lane.LATER
    waits_for_release: ClassVar[bool] = False  # it is long work of a pass, which may be held


# --- serving


class ServingOperation(Operation[R, None]):
    """Of a request: nothing that background work computes with changes by it."""

    lane = Lane.URGENT


@dataclass(frozen=True)
class Submit(ServingOperation[None]):
    """Queues a request, whose pieces follow. Raises InvalidRequest, ContextLengthExceeded."""

    request: Generate


@dataclass(frozen=True)
class Embed(ServingOperation[None]):
    """Queues what is to be embedded, whose one piece follows. Raises InvalidRequest, ContextLengthExceeded,
    NotALanguageModel."""

    key: str
    input: dict[str, Any]


@dataclass(frozen=True)
class Cancel(ServingOperation[None]):
    """Of a request, or of what is to be embedded."""

    key: str


@dataclass(frozen=True)
class Classify(ServingOperation[Classification]):
    """Raises InvalidRequest, NotAClassifier."""

    input: dict[str, Any]


@dataclass(frozen=True)
class Stats(Operation[dict[str, Any], None]):
    """What `protocol.Engine.stats` says; that it is answered shows that the serving loop turns."""

    lane = Lane.SOON


@dataclass(frozen=True)
class Refusals(Operation[list[str | None], None]):
    """Why inputs cannot be made prompts of this model, None for those that can."""

    lane = Lane.SOON
    inputs: list[dict[str, Any]]


# --- weights


class WeightsOperation(Operation[R, None]):
    """Of no session: it goes on when one is abandoned."""


@dataclass(frozen=True)
class Stage(WeightsOperation[None]):
    """Loads adapters beside the serving ones. Raises RevisionCorrupt."""

    lane = Lane.URGENT
    weights: Weights
    adapter: Path | None
    control: Path | None


@dataclass(frozen=True)
class Unstage(WeightsOperation[None]):
    lane = Lane.URGENT
    weights: Weights


@dataclass(frozen=True)
class Swap(WeightsOperation[float]):
    """Returns seconds. Raises RevisionCorrupt."""

    lane = Lane.URGENT
    weights: Weights


@dataclass(frozen=True)
class Warm(WeightsOperation[int]):
    """Computes what prompts often begin with, for weights that are to be swapped in; returns the tokens. Raises
    RevisionCorrupt."""

    weights: Weights


@dataclass(frozen=True)
class ForgetPrefixes(Operation[None, None]):
    """Drops what is kept of prompts: what is older than this (seconds since the epoch), or all."""

    lane = Lane.SOON
    before: float | None = None


@dataclass(frozen=True)
class Replay(WeightsOperation[str]):
    """sha256 of the weights that a ledger leads to. Raises RevisionCorrupt."""

    ledger: Path


@dataclass(frozen=True)
class Collect(WeightsOperation[list[int]]):
    """Writes the low-rank changes of a ledger's line as one file, see `protocol.Replaying.collecting`."""

    ledger: Path
    target: Path
    kind: str


# --- a session of background work


@dataclass(frozen=True)
class Open(Operation[None, None]):
    """Opens a session, in place of any other."""


@dataclass(frozen=True)
class Abandon(Operation[None, None]):
    """Ends the session and everything that waits for it."""

    lane = Lane.URGENT


class SessionOperation(Operation[R, P]):
    """Asks the open session; `examples` are numbers of those that were encoded in it."""


@dataclass(frozen=True)
class Encode(SessionOperation[int, int]):
    """Tokenises the examples of the JSONL file `source` ({"input", "choices", "target"} a line, the target a text or an
    assistant's message; what is "recalled" for the input besides) into `target`. Reports and returns how many. One that
    cannot be used is written as {"error": reason} and is never asked for. `more`: behind those that were encoded
    before."""

    waits_for_release = True
    source: Path
    target: Path
    more: bool = False


@dataclass(frozen=True)
class Use(SessionOperation[None, None]):
    """Computes with these staged weights from now on, and forgets updates. Raises RevisionCorrupt."""

    weights: Weights


@dataclass(frozen=True)
class ScoreExamples(SessionOperation[list[Scores], int]):
    """In the order asked for; reports how many are done."""

    waits_for_release = True
    examples: list[int]


@dataclass(frozen=True)
class Answered:
    """What was answered: its text, and its calls as the OpenAI API has them. `error`: why there is no answer. `whole`:
    it came to its own end."""

    text: str
    calls: list[dict[str, Any]]
    error: str | None = None
    whole: bool = True


@dataclass(frozen=True)
class Answer(SessionOperation[list[Answered | None], int]):
    """Answers lines of the JSONL file `source` with the weights in use as `engine.answering` says, greedily, in the
    order asked for; reports how many are done. None: `seconds` of computing were over before."""

    waits_for_release = True
    source: Path
    lines: list[int]
    seconds: float


@dataclass(frozen=True)
class Tap(SessionOperation[TapIndex, int]):
    """Writes the inputs of blocks [first, end); the index has the examples in the order asked for."""

    waits_for_release = True
    examples: list[int]
    first: int
    end: int
    path: Path


@dataclass(frozen=True)
class Loss(SessionOperation[float, None]):
    """Mean loss in nats with what learns moved by `scale` · z(seed)."""

    waits_for_release = True
    examples: list[int]
    nll_weight: float
    seed: int = 0
    scale: float = 0.0


@dataclass(frozen=True)
class Update(SessionOperation[None, None]):
    """What learns += coefficient · z(seed)."""

    seed: int
    coefficient: float


@dataclass(frozen=True)
class Drift(SessionOperation[float, None]):
    """Mean KL(reference ‖ candidate) per token in nats over `texts`; inf if anything is not finite."""

    waits_for_release = True
    texts: list[str]
    reference: Weights
    candidate: Weights


@dataclass(frozen=True)
class ScoreTexts(SessionOperation[list[list[float]], int]):
    """Log-likelihoods of texts that are none of the session's examples, with the weights in use: of each prompt's
    `answers`, the prompt being a user's message where `chat` says so and the model has a template. Reports how many
    prompts are done."""

    waits_for_release = True
    prompts: list[str]
    answers: list[list[str]]
    chat: list[bool]


@dataclass(frozen=True)
class WriteControl(SessionOperation[None, None]):
    """Writes the control vector as a GGUF file."""

    path: Path


# --- a session in which the weights themselves learn


@dataclass(frozen=True)
class SetRule(SessionOperation[None, None]):
    """Updates follow it from now on; forgets those before."""

    rule: LearningRule


@dataclass(frozen=True)
class Pair(SessionOperation[tuple[float, float], None]):
    """Losses at + and - epsilon · z(seed)."""

    waits_for_release = True
    examples: list[int]
    nll_weight: float
    seed: int
    epsilon: float


@dataclass(frozen=True)
class Descend(SessionOperation[tuple[float, float], None]):
    """A step of backpropagation, and both signs' losses."""

    waits_for_release = True
    examples: list[int]
    nll_weight: float
    seed: int
    epsilon: float
    lr: float


@dataclass(frozen=True)
class WriteMoved(SessionOperation[None, None]):
    """Writes what no ledger can make again as a safetensors file."""

    path: Path


@dataclass(frozen=True)
class Digest(SessionOperation[str, None]):
    """sha256 of the weights as they are now."""


# --- a classifier's session


@dataclass(frozen=True)
class SignStepReport:
    """A step of ElasticZO-INT8; losses in nats, those on dev where it was looked at."""

    step: int
    seed: int
    sign: int
    loss: float
    dev_loss: float | None = None
    dev_accuracy: float | None = None


@dataclass(frozen=True)
class LearnReport:
    """Of a run: the step that did best on dev, and the zeroth-order steps that its ledger holds."""

    steps: int
    best_step: int
    zo_steps: int
    dev_loss_before: float | None
    dev_loss_after: float | None
    dev_accuracy_before: float | None
    dev_accuracy_after: float | None


@dataclass(frozen=True)
class Learn(SessionOperation[LearnReport, SignStepReport]):
    """ElasticZO-INT8 on a copy of the network in use; `frozen` leaves the layers below the cutoff as they are.

    `zo_bits` and `bp_bits` are schedules over the run, `noise` is (r_max, density). The network of the step that did
    best on dev is written to `network`, the zeroth-order steps that led there to `ledger`, if there are any.
    """

    train: list[int]
    dev: list[int]
    parent: int
    bp_layers: int
    frozen: bool
    steps: int
    batch: int
    seed: int
    noise: tuple[int, int]
    zo_bits: tuple[int, ...]
    bp_bits: tuple[int, ...]
    network: Path
    ledger: Path
