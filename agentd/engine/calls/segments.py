"""Fixed texts of a format, with holes for what differs from call to call. Pure."""

import re
from collections.abc import Sequence
from enum import Enum

MORE, NO = -1, -2
"""What `match` says where the text ends too early to tell, and where it is another one."""


class Hole(Enum):
    ID = "[A-Za-z0-9_-]{1,64}"
    INDEX = "[0-9]{1,4}"
    NAME = ""  # of the function, again


Segment = tuple[str | Hole, ...]


def text_of(segment: Segment) -> str:
    """The text up to the first hole."""
    return segment[0] if segment and isinstance(segment[0], str) else ""


def match(segment: Segment, text: str, at: int, name: str = "") -> tuple[int, str | None]:
    """Where the segment ends that begins at `at`, or MORE or NO, and the id in it."""
    id = None
    for number, part in enumerate(segment):
        if part is Hole.NAME:
            part = name
        if isinstance(part, str):
            rest = text[at : at + len(part)]
            if rest != part:
                return (MORE if part.startswith(rest) else NO), None
            at += len(part)
            continue
        hit = re.compile(part.value).match(text, at)
        end = hit.end() if hit else at
        if end == len(text):
            return MORE, None
        following = segment[number + 1] if number + 1 < len(segment) else ""
        if isinstance(following, str) and following:  # an id may end with what looks like more of it
            while end > at and not text.startswith(following[: len(text) - end], end):
                end -= 1
        if end == at:
            return NO, None
        if part is Hole.ID:
            id = text[at:end]
        at = end
    return at, id


def segment(text: str, ids: tuple[str, ...] = (), name: str = "") -> Segment:
    """A text with holes where it holds one of `ids`, and the name."""
    texts = {**dict.fromkeys(ids, Hole.ID), **({name: Hole.NAME} if name else {})}
    if not texts:
        return (text,) if text else ()
    parts: list[str | Hole] = []
    for part in re.split("(" + "|".join(map(re.escape, texts)) + ")", text):
        if part:
            parts.append(texts.get(part, part))
    return tuple(parts)


def with_index(segment: Segment, number: int) -> Segment:
    """The segment with a hole where it says `number` as a number of its own."""
    parts: list[str | Hole] = []
    for part in segment:
        if isinstance(part, str):
            before, has_number, after = _number(part, number)
            parts += [p for p in (before, Hole.INDEX if has_number else "", after) if p != ""]
        else:
            parts.append(part)
    return tuple(parts)


def _number(text: str, number: int) -> tuple[str, bool, str]:
    matches = list(re.finditer(rf"(?<![0-9]){number}(?![0-9])", text))
    if not matches:
        return text, False, ""
    return text[: matches[-1].start()], True, text[matches[-1].end() :]


def cut(segment: Segment, ends: Sequence[str]) -> Segment:
    """The segment up to the first of these texts, without blanks at its end."""
    parts: list[str | Hole] = []
    for part in segment:
        if isinstance(part, str):
            at = min((at for at in (part.find(end) for end in ends if end) if at >= 0), default=-1)
            parts.append(part if at < 0 else part[:at])
            if at >= 0:
                break
        else:
            parts.append(part)
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return tuple(part for part in parts if part != "")


def common_prefix(a: str, b: str) -> str:
    """What two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # how many characters: comparing slices is much faster than comparing characters
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return a[:low]


def behind(prompt: str, whole: str) -> str:
    """What a conversation with its answer adds to the prompt for one. A template may write blanks in the prompt and in
    the history differently; where more differs, the answer begins behind the last tag that both have."""
    common = len(common_prefix(prompt, whole))
    at = common
    for character in "".join(prompt[common:].split()):
        while whole[at : at + 1].isspace():
            at += 1
        if whole[at : at + 1] != character:
            return whole[whole_tags(whole[:common]) :]
        at += 1
    return whole[at:]


def common_start(a: str, b: str) -> str:
    """What two texts begin with alike, and not in the middle of a tag."""
    common = common_prefix(a, b)
    if common in (a, b) and len(a) == len(b):
        return common
    return common[: whole_tags(common)]


def common_end(a: str, b: str) -> str:
    """What two texts end with alike, and not in the middle of a tag."""
    common = common_prefix(a[::-1], b[::-1])[::-1]
    if len(common) == min(len(a), len(b)) and common in (a, b):
        return common
    for opening, closing in ("<>", "[]"):
        at = common.find(closing)
        if at >= 0 and opening not in common[:at]:
            common = common[at + 1 :]
    return common


def whole_tags(text: str) -> int:
    """The length of the text without a tag that is not closed."""
    end = len(text)
    for opening, closing in ("<>", "[]"):
        at = text.rfind(opening)
        if at >= 0 and closing not in text[at:]:
            end = min(end, at)
    return end
