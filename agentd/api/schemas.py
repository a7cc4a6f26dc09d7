"""What may be sent, field by field. Unknown fields are refused, never ignored."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentd.errors import InvalidRequest, NotSupported
from agentd.methods import Method

_UNSUPPORTED = frozenset(
    (
        *("audio", "best_of", "echo", "function_call", "functions", "modalities", "moderation", "parallel_tool_calls"),
        *("prediction", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "safety_identifier"),
        *("service_tier", "suffix", "tool_choice", "tools", "verbosity", "web_search_options"),
    )
)
Text = Annotated[str, Field(max_length=1 << 24)]
MAX_NAME = 200  # characters
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
MAX_INTEGER = (1 << 63) - 1  # what SQLite holds

Kind = Literal["label", "demonstration", "boolean", "float", "preference", "comment"]
KINDS: tuple[str, ...] = get_args(Kind)


class Body(BaseModel):
    """A request body. Types are not guessed: "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Completion(Body):
    """What chat completions and completions have in common. top_k, min_p, repeat_penalty, grammar and choices are
    agentd's own; in `metadata`, the key `task` names the task that feedback on the answer belongs to."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None
    grammar: Text | None = None
    choices: Annotated[list[Name], Field(min_length=2, max_length=256)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    user: str | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _one_constraint(self) -> "Completion":
        form = self.response_format is not None and self.response_format.type != "text"
        if sum((form, self.grammar is not None, self.choices is not None)) > 1:
            raise ValueError("response_format, grammar and choices exclude each other")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatCompletion(Completion):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class TextCompletion(Completion):
    """POST /v1/completions."""

    prompt: Text
    logprobs: int | None = Field(None, ge=0, le=20)


class ClassifyBody(Body):
    """POST /v1/classify as JSON: nested lists of numbers in the shape that the model takes."""

    input: list[Any]
    model: str | None = None
    task: Name | None = None


class FeedbackBody(Body):
    """POST /v1/feedback. `metric` and `task` are two names for the same thing."""

    inference_id: Name
    kind: Kind
    value: Any
    task: Name | None = None
    metric: Name | None = None
    choices: Annotated[list[Name], Field(min_length=2, max_length=256)] | None = None
    source: Literal["human", "program", "implicit"] = "human"
    tags: dict[str, str] = Field(default_factory=dict)
    idempotency_key: Name | None = None

    @model_validator(mode="after")
    def _one_name(self) -> "FeedbackBody":
        if self.task is not None and self.metric is not None and self.task != self.metric:
            raise ValueError("task and metric name the same thing; send one of them")
        return self


class ExampleLine(Body):
    """A line of POST /v1/examples: one input and its right answer. A classifier's input is nested lists of numbers, or
    a PNG image in base64."""

    task: Name | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    prompt: Text | None = None
    text: Text | None = None
    input: list[Any] | None = None
    png: Text | None = None
    label: Text | None = None
    completion: Text | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "ExampleLine":
        inputs = (self.messages, self.prompt, self.text, self.input, self.png)
        if sum(given is not None for given in inputs) != 1:
            raise ValueError("give one of messages, prompt, text; for a classifier one of input, png")
        if sum(given is not None for given in (self.label, self.completion)) != 1:
            raise ValueError("give one of label, completion")
        if not (self.label if self.label is not None else self.completion):
            raise ValueError("the answer is empty")
        return self


class AdaptBody(Body):
    """POST /admin/adapt: overrides of the configuration for one pass."""

    method: Method | None = None
    blocks: int | None = Field(None, ge=0, le=10**4)
    zo_steps: int | None = Field(None, ge=0, le=10**6)
    dry_run: bool = False


class RollbackBody(Body):
    """POST /admin/rollback. Without a revision: the parent of the one that serves."""

    revision: int | None = Field(None, ge=0, le=MAX_INTEGER)
    reason: str | None = Field(None, max_length=1000)


class Selected(Body):
    """What is to be forgotten: everything that any of the fields names. Inferences go with all that was said about
    them; authors (`uid:1000`) with all they asked and said."""

    feedback: list[Name] = Field(default_factory=list, max_length=10_000)
    inferences: list[Name] = Field(default_factory=list, max_length=10_000)
    examples: list[Name] = Field(default_factory=list, max_length=10_000)
    authors: list[Name] = Field(default_factory=list, max_length=100)
    tags: dict[str, str] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="after")
    def _something(self) -> "Selected":
        if not (self.feedback or self.inferences or self.examples or self.authors or self.tags):
            raise ValueError("name what to forget: feedback, inferences, examples, authors or tags")
        return self


class ForgetBody(Selected):
    """POST /admin/forget."""

    dry_run: bool = False


class RebuildBody(Body):
    """POST /admin/rebuild: options of the pass, and what to forget before."""

    without: Selected | None = None
    method: Method | None = None
    blocks: int | None = Field(None, ge=0, le=10**4)
    zo_steps: int | None = Field(None, ge=0, le=10**6)


class ReleaseBody(Body):
    """POST /admin/release: ids of feedback that leaves quarantine."""

    feedback: list[Name] = Field(min_length=1, max_length=10_000)


def explain(error: ValidationError) -> InvalidRequest:
    """A validation error in one line per problem; a field that OpenAI has and agentd does not is called that."""
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden" and name in _UNSUPPORTED:
            return NotSupported(f"{name} is not supported by this server", param=name)
    lines = []
    for problem in error.errors()[:5]:
        where = ".".join(str(part) for part in problem["loc"])
        what = "unknown field" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}" if where else what)
    first = error.errors()[0]["loc"]
    return InvalidRequest("; ".join(lines), param=str(first[0]) if first else None)
