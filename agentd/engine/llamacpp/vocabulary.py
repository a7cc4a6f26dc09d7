"""Text to tokens and back, and the model's own chat template."""

import ctypes
import json
from datetime import datetime
from typing import Any

import jinja2
import llama_cpp as lc
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentd.engine.llamacpp.library import metadata
from agentd.errors import InvalidRequest


class Vocabulary:
    """The tokenizer of a loaded model. Thread-safe: llama.cpp's vocabulary does not change."""

    def __init__(self, model: Any) -> None:
        self._vocab = lc.llama_model_get_vocab(model)
        self.size = int(lc.llama_vocab_n_tokens(self._vocab))
        eot = lc.llama_vocab_eot(self._vocab)
        self.end = int(eot if eot >= 0 else lc.llama_vocab_eos(self._vocab))
        self.pointer = self._vocab
        bos = lc.llama_vocab_bos(self._vocab)
        eos = lc.llama_vocab_eos(self._vocab)
        self._bos = self.piece(bos, special=True).decode("utf-8", "replace") if bos >= 0 else ""
        self._eos = self.piece(eos, special=True).decode("utf-8", "replace") if eos >= 0 else ""
        source = metadata(model, "tokenizer.chat_template")
        self._template = _compile(source) if source else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def tokenize(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        """Tokens of `text`; `begin` adds the beginning-of-sequence token, `special` recognises control tokens."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from None
        begin = begin and not (special and self._bos and text.startswith(self._bos))
        size = len(data) + 8
        tokens = (lc.llama_token * size)()
        n = lc.llama_tokenize(self._vocab, data, len(data), tokens, size, begin, special)
        if n < 0:  # it needs -n places
            size = -n
            tokens = (lc.llama_token * size)()
            n = lc.llama_tokenize(self._vocab, data, len(data), tokens, size, begin, special)
        return list(tokens[:n])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; a part of a character where the vocabulary splits characters."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = lc.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        return bool(lc.llama_vocab_is_eog(self._vocab, token))

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
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
                raise_exception=_raise,
                strftime_now=lambda form: datetime.now().strftime(form),
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


def _looks_special(text: str) -> bool:
    return "<" in text  # an answer must never be read as a control token


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)
