"""Text to tokens and back."""

import ctypes
from collections.abc import Iterator
from typing import Any

import llama_cpp as lc

from agentd.engine.llamacpp.library import metadata
from agentd.engine.prompts import Prompts, encodable


class Vocabulary(Prompts):
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
        end = self.piece(eos, special=True).decode("utf-8", "replace") if eos >= 0 else ""
        super().__init__(metadata(model, "tokenizer.chat_template"), self._bos, end)

    def tokenize(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        """Tokens of `text`; `begin` adds the beginning-of-sequence token, `special` recognises control tokens."""
        data = encodable(text)
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

    def controls(self) -> Iterator[tuple[str, bool]]:
        added = lc.LLAMA_TOKEN_ATTR_USER_DEFINED
        control = lc.LLAMA_TOKEN_ATTR_CONTROL | lc.LLAMA_TOKEN_ATTR_UNKNOWN
        for token in range(self.size):
            if (kind := lc.llama_vocab_get_attr(self._vocab, token)) & (added | control):
                yield self.piece(token, special=True).decode("utf-8", "replace"), bool(kind & control)

    def is_end(self, token: int) -> bool:
        return bool(lc.llama_vocab_is_eog(self._vocab, token))
