"""A model's chat template: a program in the model file that lays out messages and tools as text."""

import contextlib
import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

_LONGEST = 1 << 20  # characters that a text is repeated to
_EXPONENT = 1000
_PROBE = "TEXTT"
_CHANGES = re.compile(r"\.(append|extend|insert|pop|remove|update|setdefault)\(")


class TemplateRefusal(Exception):
    """The template cannot lay out what it was given; the message says why."""


class ChatTemplate:
    """`source` is Jinja; `bos` and `eos` are the texts of the tokens it may ask for. Raises jinja2.TemplateError and
    others for what is no template."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        self.source, self._bos, self._eos = source, bos, eos
        self._changes = _CHANGES.search(source) is not None  # lists and objects: a copy of what it is given
        self._template = _compile(source, self._changes)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        generate: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of messages and tools as they are; with `generate`, ready to be answered. Raises TemplateRefusal."""
        context: dict[str, Any] = {
            **(variables or {}),
            "messages": list(messages),
            "tools": list(tools) or None,
            "add_generation_prompt": generate,
            "bos_token": self._bos,
            "eos_token": self._eos,
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        if tools and "functions" in self.source:
            context = {**_as_functions(tools), **context}
        if self._wants_parts:
            context["messages"] = [_in_parts(message) for message in messages]
        try:
            return self._laid_out(context)
        except TemplateRefusal:
            if tools:
                raise
        # It was made for tools, and counts on a list of them.
        return self._laid_out({**_as_functions([]), **context, "tools": []})

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether a text is passed over unless it is a part of a list: templates of models that see."""
        contents: tuple[Any, ...] = (_PROBE, [{"type": "text", "text": _PROBE}])
        shown = []
        for content in contents:
            context = {"messages": [{"role": "user", "content": content}], "raise_exception": _raise}
            with contextlib.suppress(TemplateRefusal):
                text = self._laid_out({**context, "bos_token": self._bos, "eos_token": self._eos, "tools": None})
                shown.append(_PROBE in text)
        return shown == [False, True]

    def _laid_out(self, context: dict[str, Any]) -> str:
        tools = context["tools"]
        try:
            return self._template.render(copy.deepcopy(context) if self._changes else context)
        except jinja2.UndefinedError as error:
            if not tools:
                raise TemplateRefusal(str(error)) from None
            return self._leniently(context)
        except RecursionError:
            raise TemplateRefusal("it is nested too deeply") from None
        except Exception as error:  # a template is a program: it may divide by zero
            raise TemplateRefusal(str(error)) from None

    def _leniently(self, context: dict[str, Any]) -> str:
        """With nothing for what is not there: schemas of tools seldom have all that a template looks for."""
        try:
            template = _compile(self.source, self._changes, _Nothing)
            return template.render(copy.deepcopy(context) if self._changes else context)
        except Exception as error:
            raise TemplateRefusal(str(error)) from None


def _as_functions(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Firefunction's name for tools, as text, and what else it looks for."""
    functions = json.dumps([tool["function"] for tool in tools], indent=4)
    return {"functions": functions, "datetime": datetime.now().strftime("%Y-%m-%d %H:%M:%S")}


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


class _Nothing(jinja2.ChainableUndefined):
    """What is not there, as an empty text."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says for those who train."""

    tags = {"generation"}  # noqa: RUF012  # the name is jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(SandboxedEnvironment):
    """A sandbox in which a text cannot be repeated, nor a loop go round, so often that nothing else is served."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int) and abs(right) > _EXPONENT:
            raise jinja2.TemplateError(f"a power of {right} is too large")
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > _LONGEST:
                raise jinja2.TemplateError(f"a text repeated {times} times is too long")
        return super().call_binop(context, operator, left, right)


class _Unchanging(_Bounded, ImmutableSandboxedEnvironment):
    """One that changes nothing of what it is given."""


def _compile(source: str, changes: bool, undefined: type[jinja2.Undefined] = jinja2.Undefined) -> jinja2.Template:
    sandbox = _Bounded if changes else _Unchanging
    environment = sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], undefined=undefined
    )
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it, rather than Jinja's, which makes text safe for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Iterator):  # what filters such as `map` make
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
