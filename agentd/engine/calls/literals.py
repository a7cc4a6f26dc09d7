"""Single arguments as formats write them, and back. Pure.

raw     texts as they are (or in XML's CDATA), all else as JSON
python  Python's literals, as in f(a='x', b=[True, None])
marked  texts between marks of their own, keys bare, as in {a:<|"|>x<|"|>,b:[1,2]}
"""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentd.engine.calls.segments import MORE

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CDATA = "<![CDATA[", "]]>"
_KEY = re.compile(r"[^:,{}\[\]]+")


class Unreadable(ValueError):
    """A text is no value."""


def json_type(value: Any) -> str:
    """The type of a value in JSON schemas' words; integers count as numbers."""
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def read(text: str, only_text: bool, values: str, mark: str = "") -> Any:
    """The value that a text stands for; with `only_text` nothing but texts may stand there. Raises Unreadable."""
    if values == "marked":
        return _Marked(text, mark).whole()
    if values == "python":
        return _literal(text)
    if text.startswith(_CDATA[0]) and text.endswith(_CDATA[1]):
        return text[len(_CDATA[0]) : -len(_CDATA[1])]
    if only_text:
        return text
    for known in (json.loads, _literal):
        try:
            value = known(text)
        except (ValueError, RecursionError):
            continue
        if json_type(value) in ("array", "object", "string") or re.fullmatch(r"[\w.+-]+", text.strip()):
            return value
    return text


def _literal(text: str) -> Any:
    """Python's literal; true, false and null are read as well."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _plain(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(str(error)) from None


_WORDS = {"true": True, "false": False, "null": None, "None": None, "True": True, "False": False}


def _plain(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Dict):
        pairs = zip(tree.keys, tree.values, strict=True)
        return {_plain(key) if key is not None else None: _plain(value) for key, value in pairs}
    if isinstance(tree, ast.List | ast.Tuple):
        return [_plain(each) for each in tree.elts]
    if isinstance(tree, ast.Name) and tree.id in _WORDS:
        return _WORDS[tree.id]
    value = ast.literal_eval(tree)
    if isinstance(value, set | bytes | complex) or value is ...:
        raise ValueError("no JSON")
    return value


def end_of(text: str, at: int, values: str, mark: str = "") -> int:
    """Where the literal ends that begins at `at`, brackets and quotes considered; MORE or NO where that cannot be
    told yet, or never. What may follow is one of `,`, `)`, `]`, `}`."""
    depth = 0
    while at < len(text):
        char = text[at]
        if values == "marked" and text.startswith(mark, at):
            end = text.find(mark, at + len(mark))
            if end < 0:
                return MORE
            at = end + len(mark)
            continue
        if values == "marked" and mark.startswith(text[at:]):
            return MORE
        if values == "python" and char in "'\"":
            end = _end_of_quote(text, at)
            if end < 0:
                return MORE
            at = end
            continue
        if char in "([{":
            depth += 1
        elif char in ")]}":
            if depth == 0:
                return at
            depth -= 1
        elif char == "," and depth == 0:
            return at
        at += 1
    return MORE


def _end_of_quote(text: str, at: int) -> int:
    quote, at = text[at], at + 1
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == quote:
            return at + 1
        at += 1
    return MORE


@dataclass
class _Marked:
    """Reads {a:<|"|>x<|"|>,b:[1,2]}."""

    text: str
    mark: str
    at: int = 0

    def whole(self) -> Any:
        value = self._value()
        if self.text[self.at :].strip():
            raise Unreadable(f"{self.text[self.at :]!r} is left over")
        return value

    def _value(self) -> Any:
        if self._take(self.mark):
            return self._marked()
        if self._take("{"):
            return dict(self._listed("}", self._pair))
        if self._take("["):
            return self._listed("]", self._value)
        for word, value in _WORDS.items():
            if self._take(word):
                return value
        if match := _NUMBER.match(self.text, self.at):
            self.at = match.end()
            return json.loads(match.group())
        raise Unreadable(f"no value at {self.text[self.at : self.at + 20]!r}")

    def _marked(self) -> str:
        end = self.text.find(self.mark, self.at)
        if end < 0:
            raise Unreadable("a text is not closed")
        text, self.at = self.text[self.at : end], end + len(self.mark)
        return text

    def _pair(self) -> tuple[str, Any]:
        if self._take(self.mark):
            key = self._marked()
        elif match := _KEY.match(self.text, self.at):
            key, self.at = match.group(), match.end()
        else:
            raise Unreadable("no key")
        if not self._take(":"):
            raise Unreadable("no colon")
        return key, self._value()

    def _listed(self, closing: str, each: Callable[[], Any]) -> list[Any]:
        values: list[Any] = []
        while not self._take(closing):
            if values and not self._take(","):
                raise Unreadable("no comma")
            values.append(each())
        return values

    def _take(self, text: str) -> bool:
        if text and self.text.startswith(text, self.at):
            self.at += len(text)
            return True
        return False
