"""From a request's input to tokens: the model's own chat template, and answers as they follow a prompt."""

import json
from abc import ABC, abstractmethod
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentd.errors import InvalidRequest


class Prompts(ABC):
    """A vocabulary; what it needs of a tokenizer differs by engine.

    end   the end-of-turn token
    size  number of tokens
    """

    end: int
    size: int

    def __init__(self, template: str | None, bos: str, eos: str) -> None:
        """`template` is the chat template's source; `bos` and `eos` are the texts of the tokens it may ask for."""
        self._template_bos, self._template_eos = bos, eos
        self._template = _compile(template) if template else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @abstractmethod
    def tokenize(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        """Tokens of `text`; `begin` adds the beginning-of-sequence token, `special` recognises control tokens."""

    @abstractmethod
    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; a part of a character where the vocabulary splits characters."""

    @abstractmethod
    def is_end(self, token: int) -> bool: ...

    def prompt(self, input: dict[str, Any]) -> list[int]:
        """Tokens of {"messages": [...]} in the chat template, ready to be answered, or of {"prompt": text}."""
        if "prompt" in input:
            return self.tokenize(input["prompt"], begin=True)
        return self.tokenize(self.render(input["messages"]), begin=True, special=True)

    def answer(self, input: dict[str, Any], prompt: list[int], text: str) -> list[int]:
        """Tokens of `text` as the answer to `input`, whose tokens are `prompt`.

        Tokenised together where that keeps the prompt's tokens, because some tokenizers treat the beginning of a text
        differently from its middle. After a raw prompt that ends in a word, an answer begins with a space.
        """
        if "prompt" in input:
            head, special = str(input["prompt"]), False
            if head and not head[-1].isspace() and not text[:1].isspace():
                text = " " + text
        else:
            head, special = self.render(input["messages"]), True
        if not special or not _looks_special(text):
            together = self.tokenize(head + text, begin=True, special=special)
            if together[: len(prompt)] == prompt and len(together) > len(prompt):
                return together[len(prompt) :]
        return self.tokenize(text)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The messages in the model's own chat template. Raises InvalidRequest where it has none or refuses them."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._template_bos,
                eos_token=self._template_eos,
                tools=None,
                raise_exception=_raise,
                strftime_now=lambda form: datetime.now().strftime(form),
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


def encodable(text: str) -> bytes:
    """The text in UTF-8. Raises InvalidRequest."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from None


def _looks_special(text: str) -> bool:
    return "<" in text  # an answer must never be read as a control token


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)
