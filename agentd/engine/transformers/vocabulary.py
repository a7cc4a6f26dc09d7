"""Text to tokens and back, by the tokenizer that comes with the model."""

import json
import threading
from collections.abc import Iterator
from typing import Any

from agentd.engine.prompts import Prompts, encodable

# End-of-turn tokens by the names that model families give them; a chat model's end of sequence is often another token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>")


class Vocabulary(Prompts):
    """`tokenizer` is transformers' fast tokenizer; `ends` are the tokens that the model's configuration ends at."""

    def __init__(self, tokenizer: Any, ends: list[int], size: int) -> None:
        self._backend, self._lock = tokenizer._tokenizer, threading.Lock()
        self.size = size
        special = {token: added for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._special = {token: str(added.content).encode() for token, added in special.items()}
        self._added = {token: str(added.content).encode() for token, added in tokenizer.added_tokens_decoder.items()}
        eos = tokenizer.eos_token_id
        self.end = int(eos) if eos is not None else (ends or [size - 1])[0]
        named = [self._backend.token_to_id(name) for name in _TURN_ENDS]
        self._ends = {self.end, *ends, *(token for token in named if token is not None and token in self._special)}
        decoder = json.loads(self._backend.decoder.__getstate__()) if self._backend.decoder is not None else None
        self._bytes = _byte_characters() if '"ByteLevel"' in json.dumps(decoder) else None
        bos = tokenizer.bos_token_id
        beginning = self._backend.encode("", add_special_tokens=True).ids
        self._begin = [bos] if bos is not None and bos in beginning else []
        self._bos = tokenizer.bos_token or ""
        template = tokenizer.chat_template
        super().__init__(template if isinstance(template, str) else None, self._bos, tokenizer.eos_token or "")

    def tokenize(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        encodable(text)
        begin = begin and not (special and self._bos and text.startswith(self._bos))
        with self._lock:  # constraints are compiled by a thread of their own
            self._backend.encode_special_tokens = not special  # a user's text must never become a control token
            tokens: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._begin, *tokens] if begin else tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if token in self._special:
            return self._special[token] if special else b""
        if token in self._added:
            return self._added[token]
        text = self._backend.id_to_token(token)
        if text is None:  # the model has more outputs than its vocabulary has tokens
            return b""
        if self._bytes is not None:
            return bytes(self._bytes[character] for character in text if character in self._bytes)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):  # byte fallback
            return bytes([int(text[3:5], 16)])
        return str(text).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def controls(self) -> Iterator[tuple[str, bool]]:
        for token, text in self._added.items():
            yield text.decode(), token in self._special

    def is_end(self, token: int) -> bool:
        return token in self._ends


def _byte_characters() -> dict[str, int]:
    """The character that stands for every byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, spare = {}, 256
    for byte in range(256):
        if byte in printable:
            characters[chr(byte)] = byte
        else:
            characters[chr(spare)], spare = byte, spare + 1
    return characters
