"""What may be sent, field by field. Unknown fields are refused; those of the OpenAI API's own requests are named in the
answer's header where they have no effect."""

import re
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationError, field_validator, model_validator

from agentd.api.conversations import normal_form
from agentd.api.lenient import MAX_INTEGER, MAX_NAME, Body, Lenient, Name, Text, without_nulls
from agentd.api.messages import Message, plain
from agentd.api.tools import Function, FunctionChoice, FunctionName, NamedTool, Tool, ToolChoice, tools_input
from agentd.errors import FieldNotSupported, InvalidRequest
from agentd.methods import Method, Objective


def _no_zero(tokens: int) -> int:
    """-1 is llama.cpp's word for as many as there is room for."""
    if tokens == 0:
        raise ValueError("Input should be greater than or equal to 1, or -1: as many as there is room for")
    return tokens


MaxTokens = Annotated[int, Field(ge=-1, le=MAX_INTEGER), AfterValidator(_no_zero)]

Kind = Literal["label", "demonstration", "boolean", "float", "preference", "comment"]
KINDS: tuple[str, ...] = get_args(Kind)

TEMPLATE_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "raise_exception")
)
"""What chat templates get from other fields than `chat_template_kwargs`."""


class JsonSchema(Lenient):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_llama_cpp(cls, tree: Any) -> Any:
        """Its {"type": "json_object", "schema": ...} is a constraint, too."""
        if isinstance(tree, dict) and isinstance(tree.get("schema"), dict) and tree.get("json_schema") is None:
            rest = {name: value for name, value in tree.items() if name != "schema"}
            return {**rest, "type": "json_schema", "json_schema": {"schema": tree["schema"]}}
        return tree

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self


class StreamOptions(Lenient):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Completion(Lenient):
    """What chat completions and completions have in common. top_k, min_p, repeat_penalty, grammar, choices and recall
    are agentd's own; in `metadata`, the key `task` names the task that feedback on the answer belongs to."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    max_tokens: MaxTokens | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024), BeforeValidator(without_nulls)
        ]
        | None
    ) = None
    response_format: ResponseFormat | None = None
    grammar: Text | None = None
    choices: Annotated[list[Annotated[str, Field(max_length=MAX_NAME)]], Field(min_length=2, max_length=256)] | None = (
        None
    )
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
            BeforeValidator(without_nulls),
        ]
        | None
    ) = None
    user: str | None = None
    store: bool | None = None
    recall: bool | None = None

    @model_validator(mode="after")
    def _one_constraint(self) -> "Completion":
        form = self.response_format is not None and self.response_format.type != "text"
        if sum((form, self.grammar is not None, self.choices is not None)) > 1:
            raise ValueError("response_format, grammar and choices exclude each other")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_function_call(self) -> bool:
        """Whether a call is answered as it was before there were tools."""
        return False


class ChatCompletion(Completion):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: Annotated[list[Function], Field(max_length=1024)] | None = None
    function_call: FunctionChoice | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None

    @property
    def wants_function_call(self) -> bool:
        return bool(self.functions)

    def _tools_input(self) -> dict[str, Any]:
        """What is said about tools. `functions` are what was there before them: one call an answer."""
        if not self.functions and not isinstance(self.function_call, FunctionName):
            return tools_input(self.tools or [], self.tool_choice, self.parallel_tool_calls)
        if self.tools or self.tool_choice is not None:
            raise InvalidRequest("tools and functions exclude each other", param="functions")
        choice = self.function_call
        named = NamedTool(type="function", function=choice) if isinstance(choice, FunctionName) else choice
        try:
            return tools_input([Tool(type="function", function=each) for each in self.functions or ()], named, False)
        except InvalidRequest as error:
            message = str(error).replace("tool_choice", "function_call").replace("tools", "functions")
            raise InvalidRequest(message, param="functions") from None

    def input(self) -> dict[str, Any]:
        """What the engine is asked, and an example has as its input: the messages, and all else that makes up the
        prompt or says which calls may follow. Raises InvalidRequest saying which field is wrong."""
        input = {"messages": plain(self.messages), **self._tools_input()}
        if (
            input.get("tools")
            and input.get("tool_choice") != "none"
            and (self.grammar is not None or self.choices is not None)
        ):
            raise InvalidRequest(
                "grammar and choices leave no room for calls: leave out tools or say tool_choice: none", param="tools"
            )
        kwargs = dict(self.chat_template_kwargs or {})
        if reserved := sorted(kwargs.keys() & TEMPLATE_VARIABLES):
            raise InvalidRequest(
                f"chat_template_kwargs sets {reserved[0]!r}, which the request says elsewhere",
                param="chat_template_kwargs",
            )
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
            if self.reasoning_effort == "none":
                kwargs.setdefault("enable_thinking", False)
        return {**input, "chat_template_kwargs": kwargs} if kwargs else input


class TextCompletion(Completion):
    """POST /v1/completions. With `special` a prompt's text may hold control tokens, as of a chat by hand."""

    prompt: Text | Annotated[list[Text] | list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    special: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        kinds = {type(part) for part in prompt} if isinstance(prompt, list) else {type(prompt)}
        if kinds not in ({str}, {int}) or kinds == {type(prompt)} == {int} or prompt == []:
            raise ValueError("a prompt is a text, a list of one text, or a list of token numbers")
        return prompt

    logprobs: int | None = Field(None, ge=0, le=20)

    def input(self) -> dict[str, Any]:
        """What the engine is asked. Raises InvalidRequest for several prompts."""
        prompt = self.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise InvalidRequest(
                    f"prompt holds {len(prompt)} texts, and a request is answered for one: send a request for each",
                    param="prompt",
                )
            prompt = prompt[0]
        return {"prompt": prompt, "special": True} if self.special and isinstance(prompt, str) else {"prompt": prompt}


class ClassifyBody(Body):
    """POST /v1/classify as JSON: nested lists of numbers in the shape that the model takes."""

    input: list[Any]
    model: str | None = None
    task: Name | None = None


class FeedbackBody(Body):
    """POST /v1/feedback, on an answer or on an episode as a whole. `metric` and `task` are two names for the same
    thing."""

    inference_id: Name | None = None
    episode: Name | None = None
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
        if (self.inference_id is None) == (self.episode is None):
            raise ValueError("give inference_id, or episode")
        return self


class TrainingMessage(Message):
    """A message of a conversation to learn from; an assistant's of weight 0 is not learned."""

    weight: Annotated[int, Field(ge=0, le=1)] | None = None


ExampleAnswer = Text | Annotated[list[Message], Field(min_length=1, max_length=1)]
"""An answer to learn: a text, or an assistant message."""


class ExampleLine(Body):
    """A line of POST /v1/examples: an input and its right answer, or a conversation, of which every assistant's message
    is the answer to those before it (but for those of weight 0). A classifier's input is nested lists of numbers, or a
    PNG image in base64."""

    task: Name | None = None
    messages: Annotated[list[TrainingMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    response_format: ResponseFormat | None = None
    grammar: Text | None = None
    prompt: Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    special: bool = False
    text: Text | None = None
    input: list[Any] | None = None
    png: Text | None = None
    label: Text | Annotated[bool, Strict()] | None = None
    score: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    completion: ExampleAnswer | None = None
    chosen: ExampleAnswer | None = None
    rejected: ExampleAnswer | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_others(cls, line: Any) -> Any:
        return normal_form(line) if isinstance(line, dict) else line

    @model_validator(mode="after")
    def _one_of_each(self) -> "ExampleLine":
        inputs = (self.messages, self.prompt, self.text, self.input, self.png)
        if sum(value is not None for value in inputs) != 1:
            raise ValueError("give one of messages, prompt, text; for a classifier one of input, png")
        if self.tools and self.messages is None and self.text is None:
            raise ValueError("tools go with messages or text")
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("chosen and rejected go together")
        if (isinstance(self.label, bool) or self.score is not None) and self.completion is None:
            raise ValueError("a label that is true or false and a score go with a completion")
        label = None if isinstance(self.label, bool) else self.label
        if self.score is not None and self.label is not None:
            raise ValueError("give a label or a score, not both")
        answers = sum(value is not None for value in (label, self.completion, self.chosen))
        if self.is_conversation:
            return self
        if answers != 1:
            raise ValueError(
                "give one of label, completion, chosen with rejected, or messages that end with the assistant's"
            )
        if "" in (self.label, self.completion, self.chosen, self.rejected):
            raise ValueError("the answer is empty")
        return self

    @property
    def is_conversation(self) -> bool:
        """Whether the answers stand among the messages."""
        answered = any(value is not None for value in (self.label, self.completion, self.chosen, self.rejected))
        return not answered and self.messages is not None and self.messages[-1].role == "assistant"


class AdaptBody(Body):
    """POST /admin/adapt: overrides of the configuration for one pass."""

    method: Method | None = None
    blocks: int | None = Field(None, ge=0, le=10**4)
    zo_steps: int | None = Field(None, ge=0, le=10**6)
    objective: Objective | None = None
    consolidate: bool = Field(False, description="learn everything again from the base")
    dry_run: bool = False


class RecallBody(Body):
    """POST /admin/tasks/{name}/recall."""

    recall: Literal["off", "on", "auto"]


class RollbackBody(Body):
    """POST /admin/rollback. Without a revision: what served before the one that does."""

    revision: int | None = Field(None, ge=0, le=MAX_INTEGER)
    reason: str | None = Field(None, max_length=1000)


class TaskBody(Body):
    """POST /admin/tasks/{name}: choices to take away, merged into others or removed."""

    merge: dict[
        Annotated[str, Field(max_length=MAX_NAME)], Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    ] = Field(default_factory=dict)
    remove: list[Annotated[str, Field(max_length=MAX_NAME)]] = Field(default_factory=list, max_length=1000)


class MeaningBody(Body):
    """POST /admin/tasks/{name}/meaning: since when labels mean something else; null: they always meant what they do."""

    since: Annotated[date, Strict(False)] | None
    labels: list[Annotated[str, Field(max_length=MAX_NAME)]] = Field(
        default_factory=list, max_length=1000, description="all, where none is named"
    )


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
    """POST /admin/forget. With `keep_inferences` answers stay that only the feedback was about: it was a mistake."""

    dry_run: bool = False
    keep_inferences: bool = False


class RebuildBody(Body):
    """POST /admin/rebuild: options of the pass, and what to forget before."""

    without: Selected | None = None
    method: Method | None = None
    blocks: int | None = Field(None, ge=0, le=10**4)
    zo_steps: int | None = Field(None, ge=0, le=10**6)
    objective: Objective | None = None


class ReleaseBody(Body):
    """POST /admin/release: ids of feedback that leaves quarantine."""

    feedback: list[Name] = Field(min_length=1, max_length=10_000)


_FORM = re.compile(r"\[.*|[a-z-]+\[.*|constrained-(str|int|float)|function-\w+|str|int|float|bool")
_KIND_OF_VALUE = frozenset(
    (
        "string_type",
        "list_type",
        "dict_type",
        "model_type",
        "model_attributes_type",
        "literal_error",
        "int_type",
        "bool_type",
    )
)


def explain(error: ValidationError) -> InvalidRequest:
    """A validation error in one line per problem; a field that others have and agentd does not is called that."""
    problems = []
    for problem in error.errors():
        if problem["type"] == "unsupported":
            return FieldNotSupported(problem["msg"], param=str(problem["ctx"]["name"]))
        problems.append((_place(problem["loc"]), problem))
    lines: dict[str, str] = {}
    for place, problem in problems:
        # Of several forms that a field may have, the one counts of which something was there.
        if problem["type"] in _KIND_OF_VALUE and any(
            place == other[: len(place)] and (place != other or its["type"] not in _KIND_OF_VALUE)
            for other, its in problems
        ):
            continue
        where = ".".join(place)
        what = "unknown field" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "union_tag_invalid":
            tag, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
            where += ".type"
            what = f"{tag.strip('[]')!r} is none of {known.replace('[', '').replace(']', '')}"
        lines.setdefault(where, f"{where}: {what}" if where else what)
    first = error.errors()[0]["loc"]
    return InvalidRequest("; ".join(list(lines.values())[:5]), param=str(first[0]) if first else None)


def _place(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Where a problem is as its sender would say it, without the forms that pydantic tried."""
    return tuple(str(part) for part in location if isinstance(part, int) or not _FORM.fullmatch(part))
