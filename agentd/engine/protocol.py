"""What every engine can do. One contract test suite (tests/engine/) runs against each implementation.

An engine is used from one thread only. Serving is stepwise, so that the caller decides what comes first: `submit`
queues a request, every `step` computes a little and returns what came out of it. Background work (scoring, tapping,
perturbed losses) comes as generators that yield wherever they may be interrupted; `interrupted` is asked during a
forward pass and makes it give up within one graph node.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agentd.learn.encoded import Encoded

Weights = str
"""The key under which a set of adapters was staged: a revision's number, or `candidate`."""

BASE: Weights = "0"

Target = str | dict[str, Any]
"""What an example has for an answer: a text, or an assistant's message, which may call tools."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts of the loaded model. `size_bytes` is that of the weights."""

    name: str
    architecture: str
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_params: int
    size_bytes: int
    has_chat_template: bool
    input_shape: tuple[int, ...] | None = None  # of a classifier, which has no vocabulary and no context
    classes: tuple[str, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampler settings; the defaults are llama.cpp's own. `grammar` is GBNF, or `json` for any object."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    json_schema: str | None = None

    @property
    def greedy(self) -> bool:
        """Dividing logits by less than that overflows."""
        return self.temperature < 1e-6

    @property
    def constrained(self) -> bool:
        return self.grammar is not None or self.json_schema is not None

    @property
    def is_json(self) -> bool:
        """Whether the answer must be a JSON value."""
        return self.grammar == "json" or self.json_schema is not None


@dataclass(frozen=True)
class Recalled:
    """Past corrections for a prompt: of each the messages up to the right answer and that one, the nearest first.
    `tokens` is how much longer they may make the prompt."""

    turns: list[Any]
    tokens: int


@dataclass(frozen=True)
class Generate:
    """A request to serve. `input` is as `prompts.Prompts` takes it; where it declares tools, the answer may call them.
    Of `choices` the likeliest is the answer, or at a temperature one drawn by their likelihoods. What is `recalled`
    becomes earlier turns, as far as there is room. Of one that is `private` nothing is kept when its slot is needed."""

    key: str
    input: dict[str, Any]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    choices: tuple[str, ...] = ()
    recalled: Recalled | None = None
    private: bool = False


@dataclass(frozen=True)
class CallDelta:
    """A part of the answer's call number `index`: its id and the name of the function, once and together, or a
    fragment of its arguments, which are a JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Piece:
    """Something that happened to a request: reasoning, text or calls came out, in this order, or it ended (`finish` or
    `error` is set). An answer that ends with calls finishes with `tool_calls`. `recalled` is how many corrections, the
    nearest ones, stand in its prompt."""

    key: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish: str | None = None
    revision: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    recalled: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    embedding: list[float] | None = None  # (n_embd,), of a text that was to be embedded


@dataclass(frozen=True)
class Classification:
    """What a classifier says: the probabilities of its classes, in their order."""

    probabilities: list[float]
    revision: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods in nats: of each choice as a whole, and of each token of the target. Of an example that learns
    its metric also whether each of these tokens is the likeliest one."""

    choices: list[float]
    target: list[float]
    likeliest: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class TapIndex:
    """Where a tap file has what: a plane of `rows` rows of `n_embd` float32 for each block, the lowest first.

    prefix_rows  the first rows of a plane, which all sequences share
    starts       per example its first row in every plane: the rows of what its sequences share behind the prefix, then
                 those that each sequence has of its own
    """

    n_embd: int
    prefix_rows: int
    rows: int
    starts: list[int]


@dataclass(frozen=True)
class AdapterSpec:
    """Low-rank adapters beside the linear layers, made from a seed: of kind `lora` or `tensor-train`.

    differentiated  they learn by backpropagation (with AdamW)
    """

    kind: str
    rank: int
    alpha: float
    seed: int
    differentiated: bool = False


@dataclass(frozen=True)
class LearningRule:
    """How updates move what learns, where the weights themselves do (agentd.nn).

    distribution  of z, by which zeroth-order steps move it, and their `sparsity`: see learn.update_rule
    blocks        the number of last ones that, with the final norm and a head of its own, learn by backpropagation
    everywhere    zeroth-order steps move these too, instead of the trunk alone
    adapters      updates move such adapters instead, and the weights stay as they are
    """

    distribution: str = "rademacher"
    sparsity: float | None = None
    blocks: int = 0
    everywhere: bool = False
    adapters: AdapterSpec | None = None

    @property
    def differentiates(self) -> bool:
        return self.blocks > 0 or (self.adapters is not None and self.adapters.differentiated)


class Interrupted(Exception):
    """Background work was given up because something more urgent arrived."""


class Background(Protocol):
    """A session of background work over the same weights, in a context of its own; freed by `close`."""

    @property
    def vocabulary(self) -> Any:
        """A `prompts.Prompts`."""

    def encode(self, input: dict[str, Any], choices: Sequence[str], target: Target, **more: Any) -> Encoded:
        """`more` as `encode.encode_example` takes it. Raises InvalidRequest for an example that cannot be laid out or
        does not fit a batch."""

    def use(self, weights: Weights) -> None:
        """Computes with these staged adapters from now on, and forgets updates. Raises RevisionCorrupt."""

    def score(self, examples: Sequence[Encoded]) -> Iterator[list[Scores]]:
        """Yields the scores of the next few examples, in order."""

    def tap(self, examples: Sequence[Encoded], blocks: range, path: Path) -> Iterator[int | TapIndex]:
        """Writes the inputs of `blocks` for every token to `path`. Yields the examples done, at last the index."""

    def loss(self, examples: Sequence[Encoded], nll_weight: float, seed: int, scale: float) -> Iterator[float | None]:
        """Mean loss with the control vector moved by `scale` · z(seed). Yields None where interruptible, then it."""

    def answer(
        self, requests: Sequence[Generate], enough: Callable[[Piece], bool]
    ) -> Generator[list[Piece], None, None]:
        """Answers requests with the weights as they are now, each until a piece of it is `enough`. Yields their pieces;
        where it may be interrupted, perhaps none. Closing it gives up the rest."""

    def update(self, seed: int, coefficient: float) -> None:
        """Control vector += coefficient · z(seed)."""

    def write_control(self, path: Path) -> None:
        """Writes the control vector as a GGUF file that llama.cpp's own tools load."""

    def drift(self, texts: Sequence[str], reference: Weights, candidate: Weights) -> Iterator[float | None]:
        """Mean KL(reference ‖ candidate) per token in nats over `texts`; inf if anything is not finite."""

    def close(self) -> None: ...


@runtime_checkable
class InPlaceBackground(Protocol):
    """What a session can do besides where the weights themselves learn: loss and update then move all of them, on a
    copy that serving never sees, or low-rank changes beside them."""

    def rule(self, rule: LearningRule) -> None:
        """Updates follow it from now on; forgets those before."""

    def pair(
        self, examples: Sequence[Encoded], nll_weight: float, seed: int, epsilon: float
    ) -> Iterator[tuple[float, ...] | None]:
        """(loss at + epsilon · z(seed), loss at - epsilon · z(seed)). Yields None where interruptible, then it."""

    def descend(
        self, examples: Sequence[Encoded], nll_weight: float, seed: int, epsilon: float, lr: float
    ) -> Iterator[tuple[float, ...] | None]:
        """A step of backpropagation, with both signs' losses as `pair` has them. Yields None where interruptible, then
        them."""

    def write_moved(self, path: Path) -> None:
        """Writes what no ledger can make again, as it is now, as a safetensors file: the tensors that backpropagation
        moves, or the factors of changes."""

    def digest(self) -> str:
        """sha256 of the weights as they are now."""


class Engine(Protocol):
    info: ModelInfo

    def submit(self, request: Generate) -> None:
        """Queues a request. Raises InvalidRequest or ContextLengthExceeded."""

    def cancel(self, key: str) -> None: ...

    @property
    def busy(self) -> bool:
        """Whether a request is being answered or waits."""

    def step(self) -> list[Piece]:
        """Computes the next few tokens of one or more requests."""

    def stage(self, weights: Weights, adapter: Path | None, control: Path | None) -> None:
        """Loads adapters beside the serving ones, in place of any of that name. Raises RevisionCorrupt."""

    def unstage(self, weights: Weights) -> None:
        """Frees adapters as soon as nothing computes with them; never the base or what new requests get."""

    def swap(self, weights: Weights) -> float:
        """Requests submitted from now on get these weights, running ones finish on theirs; returns seconds.

        Raises RevisionCorrupt when they are not staged.
        """

    def background(self, interrupted: Callable[[], bool], serve: Callable[[], bool] = ...) -> Background:
        """A new session. Where `interrupted()` is true it gives way: it gives its work up and yields, or it calls
        `serve` in the middle of it, which has requests answered and is false where the work has to be given up."""

    def session(self, interrupted: Callable[[], bool], serve: Callable[[], bool]) -> Any:
        """An `engine.session.OperationSession` over new background work."""

    def stats(self) -> dict[str, Any]:
        """`active` and `waiting` requests, the serving `weights`, names `staged`, and how many are `leaving`."""

    def close(self) -> None: ...


@runtime_checkable
class Replaying(Protocol):
    """What an engine can do besides when its revisions are ledgers of steps on the weights, or changes of them. What
    takes long yields where serving may cut in."""

    def staging(self, weights: Weights, adapter: Path | None, control: Path | None) -> Generator[None, None, None]:
        """Stages the revision whose ledger is `adapter`. Raises RevisionCorrupt."""

    def replaying(self, ledger: Path) -> Generator[None, None, str]:
        """Returns the sha256 of the weights that a ledger's line leads to from the base. Raises RevisionCorrupt."""

    def collecting(self, ledger: Path, target: Path, kind: str) -> Generator[None, None, list[int]]:
        """Writes the low-rank changes of a ledger's line as one file, `kind` safetensors or gguf, and returns their
        ranks. Raises RevisionCorrupt, and for gguf Conflict where other things than such changes are in that line."""


@runtime_checkable
class Keeping(Protocol):
    """What an engine can do besides when it keeps what prompts begin with."""

    def tend(self) -> bool:
        """Called while there is nothing to do: keeps what one more slot holds. False where there is none."""

    def warming(self, weights: Weights, interrupted: Callable[[], bool]) -> Generator[None, None, int]:
        """Computes with staged weights what prompts often begin with, before they are swapped in; returns the tokens.
        Yields where serving may cut in. Raises RevisionCorrupt."""

    def forget(self, before: float | None) -> None:
        """Drops what is kept of prompts: what is older than this (seconds since the epoch), or all; and what slots
        hold that no one uses."""


@runtime_checkable
class Embedder(Protocol):
    """What an engine can do besides when its model has hidden states to pool."""

    def embed(self, key: str, input: dict[str, Any]) -> None:
        """Queues a text or tokens, as `prompts.Prompts` takes them: a step brings one piece, with its embedding. Raises
        InvalidRequest or ContextLengthExceeded."""


@runtime_checkable
class Prompting(Protocol):
    """What an engine can do besides when its model reads text."""

    def prepare(self) -> None:
        """Does now what the first request would wait for."""

    def refusal(self, input: dict[str, Any]) -> str | None:
        """Why an input cannot be made a prompt, at any length; None: it can."""


@runtime_checkable
class Classifier(Protocol):
    """What an engine can do besides when its model is a classifier."""

    def classify(self, input: dict[str, Any]) -> Classification:
        """Answers at once. Raises InvalidRequest for an input that the model does not take."""
