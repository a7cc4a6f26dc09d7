"""Regular expressions of JSON schemas as llguidance takes them, with the meaning that JavaScript, Python and Rust agree
on. Pure.

`\\W` is everything but ASCII in JavaScript (ECMA-262, which JSON Schema names) and less in Python; `[a&&b]` is three
characters there and an intersection in Rust. An answer has to satisfy whoever checks it, so a class becomes the part
that all of them allow, and what they read as different things is refused. NUL is left out of every class: of one that
holds all control characters llguidance's JSON strings take any escape, `\\"` for `[^"]` too.
"""

import re
from dataclasses import dataclass, field

Ranges = list[tuple[int, int]]

_LAST = 0x10FFFF
_DIGIT: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: Ranges = [
    *((0x9, 0xD), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680)),
    *((0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
]
_NARROW = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
"""What everyone counts among digits, letters of words, blanks."""
_WIDE = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}\p{M}\p{Pc}", "s": r"\s\x{1C}-\x{1F}\x{85}\x{180E}\x{FEFF}"}
"""What anyone does, as the inside of a class."""
_CONTROLS = {"t": 0x9, "n": 0xA, "v": 0xB, "f": 0xC, "r": 0xD}
_HEX = {"x": 2, "u": 4}
_LEFT = (*"bBk", *"123456789")  # not supported, as whoever compiles it will say
_PROPERTY = re.compile(
    r"[LMNPSZ][a-z&]?|(Script|sc|scx|Script_Extensions)=\w+|Letter|Number|Punctuation|Symbol|Emoji|Alphabetic"
)
_ANYTHING = r"[^\n\r\x{0}\x{85}\x{2028}\x{2029}]"
_GROUPS = ("?:", "?<", "?P<", "?=", "?!", "?i)", "?i:")
_HERE = "`{}` means different things in different dialects of regular expressions"


class NotPortable(ValueError):
    """What does not mean the same everywhere; the message says which part."""


def portable(pattern: str) -> str:
    """Raises NotPortable. What is no expression at all is left to whoever compiles it."""
    return _Pattern(pattern).translated()


class _Pattern:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def translated(self) -> str:
        parts = []
        while head := self._peek():
            if head == "\\":
                parts.append(self._escape())
            elif head == "[":
                parts.append(self._class())
            elif head == ".":
                self._at += 1
                parts.append(_ANYTHING)
            else:
                if head == "(" and self._peek(2) == "(?" and not self._text.startswith(_GROUPS, self._at + 1):
                    raise NotPortable(_HERE.format(self._peek(3)))
                self._at += 1
                parts.append(head)
        return "".join(parts)

    def _escape(self) -> str:
        """An escape outside of classes."""
        kind = self._peek(2)[1:]
        if kind and kind.lower() in _NARROW:
            self._at += 2
            return f"[{_inside(_NARROW[kind])}]" if kind in _NARROW else _without(_WIDE[kind.lower()])
        if kind in ("p", "P"):
            name = self._property()
            return rf"\p{{{name}}}" if kind == "p" else _without(rf"\p{{{name}}}")
        if kind in _LEFT:
            self._at += 2
            return f"\\{kind}"
        return _literal(self._character())

    def _class(self) -> str:
        place = self._at
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        if self._peek() == "]":
            raise NotPortable(_HERE.format(self._text[place : self._at + 1]))
        members = _Members()
        while (head := self._peek()) != "]":
            if not head:
                raise NotPortable("a class of characters is not closed")
            if head == "[" and self._peek(2)[1:] in (":", ".", "="):
                raise NotPortable(_HERE.format(self._peek(2)))
            first = self._member(members)
            if first is None or self._peek() != "-" or self._peek(2)[1:] in ("]", ""):
                continue  # behind a class a hyphen is one: [\\w-.]
            self._at += 1
            last = self._member(members)
            if last is None or last < first:
                raise NotPortable(f"a range in {self._text[place : self._at]}] is none")
            members.ranges.append((first, last))
        self._at += 1
        return members.none_of() if negated else members.any_of()

    def _member(self, members: "_Members") -> int | None:
        """Takes one character of a class, which is returned, or a class in it."""
        kind = self._peek(2)[1:] if self._peek() == "\\" else ""
        if kind and kind.lower() in _NARROW:
            self._at += 2
            (members.classes if kind in _NARROW else members.complements).append(kind.lower())
            return None
        if kind and kind in "pP":
            (members.properties if kind == "p" else members.others).append(self._property())
            return None
        character = self._character()
        members.ranges.append((character, character))
        return character

    def _property(self) -> str:
        """The name of a property. Those that hold control characters are not taken."""
        end = self._text.find("}", self._at)
        name = self._text[self._at + 3 : end]
        if self._peek(3)[2:] != "{" or end < 0 or not _PROPERTY.fullmatch(name):
            raise NotPortable(f"`{self._peek(3)}{name}}}` is not supported")
        self._at = end + 1
        return name

    def _character(self) -> int:
        """One character, or the escape of one, at which the place stands."""
        head = self._peek()
        self._at += 1
        if head != "\\":
            return ord(head)
        kind = self._peek()
        self._at += 1
        if not kind:
            raise NotPortable("nothing follows the last backslash")
        if kind in _CONTROLS:
            return _CONTROLS[kind]
        if kind in _HEX:
            return self._hexadecimal(kind)
        if kind == "0" and not self._peek().isdigit():
            return 0
        if kind == "c" and (letter := self._peek()).isascii() and letter.isalpha():
            self._at += 1
            return ord(letter) % 32
        if kind.isalnum():
            raise NotPortable(_HERE.format(f"\\{kind}"))
        return ord(kind)

    def _hexadecimal(self, kind: str) -> int:
        if self._peek() == "{":
            end = self._text.find("}", self._at)
            digits, after = self._text[self._at + 1 : max(end, 0)], end + 1
        else:
            digits, after = self._text[self._at : self._at + _HEX[kind]], self._at + _HEX[kind]
        try:
            number = int(digits, 16)
        except ValueError:
            raise NotPortable(f"`\\{kind}{digits}` is no character") from None
        self._at = after
        low = self._text[after + 2 : after + 6]
        if 0xD800 <= number < 0xDC00 and self._text.startswith("\\u", after) and len(low) == 4:
            pair = chr(number) + chr(int(low, 16)) if all(c in "0123456789abcdefABCDEF" for c in low) else ""
            number = ord(pair.encode("utf-16", "surrogatepass").decode("utf-16", "replace")[:1] or "\ufffd")
            self._at += 6
        if number > _LAST or 0xD800 <= number < 0xE000:
            raise NotPortable(f"`\\{kind}{digits}` is no character")
        return number

    def _peek(self, n: int = 1) -> str:
        return self._text[self._at : self._at + n]


@dataclass
class _Members:
    """What stands in a class of characters."""

    ranges: Ranges = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # of _NARROW
    complements: list[str] = field(default_factory=list)  # of these
    properties: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # properties that characters must not have

    def any_of(self) -> str:
        ranges = [*self.ranges, *(each for name in self.classes for each in _NARROW[name])]
        properties = "".join(rf"\p{{{name}}}" for name in self.properties)
        ranges = [(max(low, 1), high) for low, high in ranges if high > 0] or ([] if properties else ranges)
        ways = [f"[{_inside(ranges)}{properties}]"] if ranges or properties else []
        ways += [_without(_WIDE[name]) for name in self.complements]
        ways += [_without(rf"\p{{{name}}}") for name in self.others]
        return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"

    def none_of(self) -> str:
        if self.others or (self.complements and self.properties):
            raise NotPortable("a negated class of what has not a property is not supported")
        if not self.complements:
            wide = "".join([*(_WIDE[name] for name in self.classes), *(rf"\p{{{name}}}" for name in self.properties)])
            return f"[^{_inside([*self.ranges, (0, 0)])}{wide}]"
        # what is in none of the complements is in all of the classes
        left = {c for low, high in _NARROW[self.complements[0]] for c in range(low, high + 1)}
        for name in self.complements[1:]:
            left &= {c for low, high in _NARROW[name] for c in range(low, high + 1)}
        gone = [*self.ranges, *(each for name in self.classes for each in _NARROW[name])]
        left = {c for c in left if not any(low <= c <= high for low, high in gone)}
        if not left:
            raise NotPortable("a class of no characters can never be met")
        return f"[{_inside([(c, c) for c in left])}]"


def _without(inside: str) -> str:
    """A class of everything else, but for NUL."""
    return f"[^{inside}\\x{{0}}]"


def _inside(ranges: Ranges) -> str:
    """The inside of a class of these ranges, merged."""
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return "".join(_literal(low) if low == high else f"{_literal(low)}-{_literal(high)}" for low, high in merged)


def _literal(character: int) -> str:
    text = chr(character)
    return text if text.isascii() and text.isalnum() else f"\\x{{{character:X}}}"
