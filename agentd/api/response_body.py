"""The body of a request of the Responses API, and the chat completion that it is."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError

from agentd.api.lenient import Lenient, Name, Text, without_nulls
from agentd.api.response_items import (
    FunctionCall,
    FunctionCallOutput,
    Input,
    ItemReference,
    MessageItem,
    ReasoningItem,
    messages_of,
)
from agentd.api.schemas import ChatCompletion, MaxTokens, explain
from agentd.api.tools import Mode, ToolName, form_of_choice
from agentd.errors import FieldNotSupported, InvalidRequest

_PARAMS = {"messages": "input", "response_format": "text", "max_completion_tokens": "max_output_tokens"}
"""What fields of chat completions are called here."""


class FunctionTool(Lenient):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Lenient):
    type: Literal["function"]
    name: ToolName


class AllowedFunctions(Lenient):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1)]


class TextFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Lenient):
    format: TextFormat | None = None


class ReasoningOptions(Lenient):
    harmless: ClassVar[frozenset[str]] = frozenset(("summary", "generate_summary"))

    effort: Annotated[str, Field(max_length=32)] | None = None


class ResponseStreamOptions(Lenient):
    include_obfuscation: bool | None = None


class ResponsesBody(Lenient):
    """POST /v1/responses. seed, top_k, min_p, stop, the penalties, logit_bias, grammar, choices, recall and
    chat_template_kwargs are as in chat completions."""

    unsupported: ClassVar[Any] = {
        **Lenient.unsupported,
        **dict.fromkeys(("conversation", "prompt", "messages", "context_management"), ([], {}, "")),
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), ()),  # max_output_tokens here
        **dict.fromkeys(("background", "logprobs"), (False,)),
        "n": (1,),
        "response_format": ({"type": "text"},),
    }
    harmless: ClassVar[frozenset[str]] = Lenient.harmless | {"max_tool_calls", "prompt_cache_options"}

    input: Input | None = None
    instructions: Text | None = None
    model: str | None = None
    previous_response_id: Name | None = None
    max_output_tokens: MaxTokens | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=1024)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Mode, Tag("[mode]")]
            | Annotated[NamedFunction, Tag("[named]")]
            | Annotated[AllowedFunctions, Tag("[allowed]")],
            Discriminator(form_of_choice),
        ]
        | None
    ) = None
    parallel_tool_calls: bool = True
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    store: bool = True
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: Annotated[dict[str, str], BeforeValidator(without_nulls)] | None = None
    user: str | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: Text | list[Text] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repeat_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(without_nulls)] | None = None
    grammar: Text | None = None
    choices: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    recall: bool | None = None

    def ignored(self) -> list[str]:
        others = [name for name in self.include or () if name != _LOGPROBS]
        return [*super().ignored(), *(["include"] if others else [])]

    @property
    def logprobs(self) -> int | None:
        """How many log-probabilities of each token of the text are asked for; None for not even its own."""
        if self.top_logprobs or _LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return None

    @property
    def references(self) -> list[str]:
        """The ids of stored items in the input."""
        return [item.id for item in self.input or () if isinstance(item, ItemReference)]

    def chat(self, before: list[dict[str, Any]], stored: Mapping[str, dict[str, Any]]) -> ChatCompletion:
        """The same as a chat completion, after the messages `before`; `stored` has what it refers to. Raises
        InvalidRequest."""
        said = []
        if isinstance(self.input, list):
            items = [_STORED.validate_python(stored[i.id]) if isinstance(i, ItemReference) else i for i in self.input]
            said = messages_of(items)
        if isinstance(self.input, str):
            said = [{"role": "user", "content": self.input}]
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        messages = [*instructions, *before, *said]
        if not [*before, *said]:
            raise InvalidRequest("input is missing", param="input")
        tree = {name: getattr(self, name) for name in _SAME}
        tree |= {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _response_format(self.text),
            "tools": [_tool(tool) for tool in self.tools or []],
            "tool_choice": _choice(self.tool_choice),
        }
        try:
            return ChatCompletion.model_validate({name: value for name, value in tree.items() if value is not None})
        except ValidationError as error:
            raise renamed(explain(error)) from None

    def about(self, model: str) -> dict[str, Any]:
        """What the response repeats of its request."""
        form = self.text.format if self.text and self.text.format else TextFormat.model_validate({})
        choice = self.tool_choice
        return {
            "model": model,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": self.store,
            "temperature": self.temperature,
            "text": {"format": _plain(form)},
            "tool_choice": choice if isinstance(choice, str) else _plain(choice) or "auto",
            "tools": [{"parameters": None, "strict": None, **_plain(tool)} for tool in self.tools or []],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": self.truncation,
            "user": self.user,
        }


_LOGPROBS = "message.output_text.logprobs"
_STORED: TypeAdapter[MessageItem | FunctionCall | FunctionCallOutput | ReasoningItem] = TypeAdapter(
    MessageItem | FunctionCall | FunctionCallOutput | ReasoningItem
)
_SAME = (
    *("model", "stream", "store", "temperature", "top_p", "metadata", "user", "seed", "top_k", "min_p", "stop"),
    *("frequency_penalty", "presence_penalty", "repeat_penalty", "logit_bias", "grammar", "choices", "recall"),
    *("chat_template_kwargs", "parallel_tool_calls"),
)


def _response_format(text: TextOptions | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if text.format.type != "json_schema":
        return {"type": text.format.type}
    if text.format.schema_ is None:
        raise InvalidRequest("text.format of type json_schema needs a schema", param="text")
    form = _plain(text.format)
    return {"type": form.pop("type"), "json_schema": form}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = _plain(tool)
    return {"type": function.pop("type"), "function": function}


def _choice(choice: str | NamedFunction | AllowedFunctions | None) -> str | dict[str, Any] | None:
    if choice is None or isinstance(choice, str):
        return choice
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    tools = [_choice(tool) for tool in choice.tools]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}


def _plain(part: Lenient | None) -> dict[str, Any]:
    """A part's own fields, as they were sent."""
    if part is None:
        return {}
    return part.model_dump(by_alias=True, exclude_none=True, exclude=set(part.model_extra or ()))


def renamed(error: InvalidRequest) -> InvalidRequest:
    """With the fields' names that this API has."""
    error.param = _PARAMS.get(str(error.param), error.param)
    if isinstance(error, FieldNotSupported):
        return error
    error.args = (str(error).replace("tool_call_id", "call_id"),)
    for chat, here in _PARAMS.items():
        if str(error).startswith(f"{chat}."):
            error.args = (here + str(error).removeprefix(chat),)
    return error
