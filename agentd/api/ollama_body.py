"""Requests of Ollama's API, and what they are in our own words.

The fields are those of Ollama's docs/api.md (0.12). Arguments of calls are objects there, calls have no ids, and a
result says of which tool it is, if anything: ids are given here, and it is that of the oldest call without a result.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from agentd.api.lenient import Body, Lenient, Name, Text
from agentd.api.schemas import ChatCompletion, TextCompletion, explain
from agentd.api.tools import Function, Mode
from agentd.errors import InvalidRequest

C = TypeVar("C", bound=Body)
Tree = dict[str, Any]


def _whole(value: Any) -> Any:
    """Programs in languages without whole numbers send 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Int = Annotated[int, BeforeValidator(_whole), Field(ge=-(1 << 63), lt=1 << 63)]
_Metadata = dict[str, str]


class OllamaOptions(Lenient):
    """Of a model's parameters those that have a say in the answer. What is about memory and processors is passed over:
    the daemon's configuration says that, `num_ctx` included."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mirostat": (0,),
        **dict.fromkeys(("tfs_z", "typical_p"), (1,)),
        "repeat_last_n": (64,),
        "penalize_newline": (True,),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        (
            *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "f16_kv"),
            *("use_mmap", "use_mlock", "vocab_only", "logits_all", "embedding_only", "draft_num_predict"),
            *("mirostat_tau", "mirostat_eta", "rope_frequency_base", "rope_frequency_scale", *unsupported),
        )
    )

    temperature: float | None = None
    top_p: float | None = None
    top_k: _Int | None = None
    min_p: float | None = None
    seed: _Int | None = None
    num_predict: _Int | None = None
    stop: Text | list[Text] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def tree(self) -> Tree:
        """As our completions have them. There 0 tokens are as many as there is room for, the seed -1 is none, and a
        top_k below 1 (n8n's default is -1) leaves all in."""
        same = ("temperature", "top_p", "min_p", "stop", "repeat_penalty")
        options = {name: getattr(self, name) for name in (*same, "presence_penalty", "frequency_penalty")}
        if self.num_predict is not None:
            options["max_tokens"] = self.num_predict if self.num_predict > 0 else -1
        if self.top_k is not None:
            options["top_k"] = max(0, self.top_k)
        return {**options, "seed": None if self.seed == -1 else self.seed}


class _Asked(Lenient):
    """What all requests for an answer have. `metadata`, `store`, `recall` and tool_choice are agentd's own."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("images", "context"), ([],)),
        **dict.fromkeys(("suffix", "template"), ("",)),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(("truncate", "shift", "width", "height", "steps", *unsupported))

    model: str | None = None
    stream: bool = True
    format: Literal["", "json"] | Tree | None = None
    options: OllamaOptions | None = None
    keep_alive: Text | float | None = None  # the model is always there
    think: bool | Annotated[str, Field(max_length=32)] | None = None
    logprobs: bool = False
    top_logprobs: _Int | None = None
    metadata: _Metadata | None = None
    store: bool | None = None
    recall: bool | None = None

    def tree(self) -> Tree:
        """As our completions have it. Raises InvalidRequest."""
        tree = self.options.tree() if self.options else {}
        tree |= {"stream": self.stream, "metadata": self.metadata, "store": self.store, "recall": self.recall}
        if self.format == "json":
            tree["response_format"] = {"type": "json_object"}
        elif self.format:
            schema = {"name": "format", "schema": self.format}
            tree["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.think is True:
            tree["chat_template_kwargs"] = {"enable_thinking": True}
        elif self.think is not None:
            tree["reasoning_effort"] = self.think or "none"
        return tree

    @property
    def alternatives(self) -> int | None:
        """How many log-probabilities of each token are asked for; None for not even its own. Raises InvalidRequest."""
        if not 0 <= (self.top_logprobs or 0) <= 20:
            raise InvalidRequest("top_logprobs is 0 to 20", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def unloads(self) -> bool:
        """Whether an empty request asks for the model to go; it stays, but is said what was asked for."""
        return str(self.keep_alive).rstrip("smh") in ("0", "0.0")


class OllamaFunction(Lenient):
    name: Name
    arguments: Tree | None = None


class OllamaCall(Lenient):
    id: Name | None = None
    function: OllamaFunction


class OllamaMessage(Lenient):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"images": ([],)}
    harmless: ClassVar[frozenset[str]] = frozenset(("images",))

    role: Literal["system", "user", "assistant", "tool"]
    content: Text = ""
    thinking: Text | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: Text | None = None
    tool_call_id: Name | None = None


class OllamaTool(Lenient):
    type: Literal["function"] = "function"
    function: Function


class OllamaChat(_Asked):
    """POST /api/chat."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: Annotated[list[OllamaTool], Field(max_length=1024)] | None = None
    tool_choice: Mode | None = None
    parallel_tool_calls: bool = True

    def chat(self) -> ChatCompletion:
        """Raises InvalidRequest."""
        tools = [
            {"type": "function", "function": tool.function.model_dump(exclude_none=True, include=_FUNCTION)}
            for tool in self.tools or ()
        ]
        tree = {**self.tree(), "messages": _messages(self.messages), "tools": tools, "tool_choice": self.tool_choice}
        return _checked(ChatCompletion, {**tree, "parallel_tool_calls": self.parallel_tool_calls})


class OllamaGenerate(_Asked):
    """POST /api/generate: a prompt that the chat template renders, or as it is with `raw`."""

    prompt: Text = ""
    system: Text | None = None
    raw: bool = False

    def completion(self) -> ChatCompletion | TextCompletion:
        """Raises InvalidRequest."""
        tree = self.tree()
        if self.raw:
            if self.system:
                raise InvalidRequest("raw takes the prompt as it is: put system into it", param="system")
            for name in ("chat_template_kwargs", "reasoning_effort"):
                tree.pop(name, None)
            return _checked(TextCompletion, {**tree, "prompt": self.prompt, "special": True})
        system = [{"role": "system", "content": self.system}] if self.system else []
        return _checked(ChatCompletion, {**tree, "messages": [*system, {"role": "user", "content": self.prompt}]})


class _OfModel(Lenient):
    """What is about a model and no answer; the rest of it changes nothing."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset(
        ("keep_alive", "options", "truncate", "verbose", "system", "template")
    )


class OllamaEmbed(_OfModel):
    """POST /api/embed. Texts that are too long are refused, whatever `truncate` says."""

    model: str | None = None
    input: Text | Annotated[list[Text], Field(max_length=2048)] = ""
    dimensions: Annotated[int, Field(ge=1)] | None = None


class OllamaEmbeddings(_OfModel):
    """POST /api/embeddings, which embed has taken the place of."""

    model: str | None = None
    prompt: Text = ""


class OllamaShow(_OfModel):
    """POST /api/show."""

    model: str | None = None
    name: str | None = None  # what it was called before


_FUNCTION = {"name", "description", "parameters", "strict"}
_NAMES = {"max_tokens": "options.num_predict", "response_format": "format", "reasoning_effort": "think"}


def _messages(messages: list[OllamaMessage]) -> list[Tree]:
    """Messages of chat completions. Raises InvalidRequest for a result that answers no call."""
    plain: list[Tree] = []
    pending: dict[str, str] = {}  # ids of calls without a result, with the names of their functions
    for number, message in enumerate(messages):
        tree: Tree = {"role": message.role, "content": message.content}
        if message.thinking and message.role == "assistant":
            tree["reasoning_content"] = message.thinking
        if message.tool_calls:
            tree["tool_calls"] = calls = [
                _call(call, f"call_{number}_{index}") for index, call in enumerate(message.tool_calls)
            ]
            pending |= {call["id"]: call["function"]["name"] for call in calls}
        if message.role == "tool":
            id = _answered(message, pending)
            if id is None:
                what = f"of {message.tool_name!r} " if message.tool_name else ""
                raise InvalidRequest(f"messages.{number}: the result {what}answers no call before it", param="messages")
            pending.pop(id, None)
            tree["tool_call_id"] = id
        plain.append(tree)
    return plain


def _call(call: OllamaCall, id: str) -> Tree:
    arguments = json.dumps(call.function.arguments or {}, ensure_ascii=False)
    return {"id": call.id or id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _answered(message: OllamaMessage, pending: Mapping[str, str]) -> str | None:
    """The id of the call that a result is of."""
    if message.tool_call_id is not None:
        return message.tool_call_id
    named = [id for id, name in pending.items() if message.tool_name in (None, "", name)]
    return named[0] if named else None


def _checked(kind: type[C], tree: Tree) -> C:
    try:
        return kind.model_validate({name: value for name, value in tree.items() if value is not None})
    except ValidationError as error:
        problem = explain(error)
        name = str(problem.param)
        if name in OllamaOptions.model_fields or name in _NAMES:
            here = _NAMES.get(name, f"options.{name}")
            problem.args = (str(problem).replace(name, here, 1),)
            problem.param = here
        raise problem from None
