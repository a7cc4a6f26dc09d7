"""The format of calls whose arguments stand one by one (XML, key and value, Python), by rendering one more argument."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agentd.engine.calls.format import CallFormat, Parameters
from agentd.engine.calls.literals import Unreadable, json_type, read
from agentd.engine.calls.probes import NAMES, NotDerivable, Turns
from agentd.engine.calls.segments import Hole, Segment, common_end, common_start, segment, with_index

_KEY, _TEXT = "alpha", "SENTINEL0"
_NASTY = 'it\'s "so" \\ {a: 1}\n<b> naïve 😀'
_NESTED = {"k": "TEXTT", "l": [True, None, 2.5, "it's"], "m": {"n": 'a "q"'}}
_WORDS = {"true": True, "false": False, "null": None}
_SAMPLES: dict[str, tuple[Any, str]] = {
    "number": (7919, r"7919"),
    "boolean": (True, r"[Tt]rue"),
    "null": (None, r"null\b(?!\")|None"),
    "array": ([7919], r"\[\s*7919\s*\]"),
    "object": ({"kk": 7919}, r"""\{\s*(["']?)kk\1\s*:\s*7919\s*\}"""),
}
"""A value of every type but text, and how it may be written."""


def block(number: int) -> str:
    """The pattern of a call's arguments, which are one text."""
    return rf"{_KEY}([\s\S]{{1,200}}?)SENTINEL{number}"


def derive_parameters(turns: Turns, calls: CallFormat, body: Callable[[str], str]) -> CallFormat:
    """The format of which all is known but the arguments and what follows them. Raises NotDerivable."""

    def behind_name(*arguments: dict[str, Any]) -> str:
        turn = body(turns.calls(*arguments))
        turn = turn[: len(turn) - len(common_end(turn, turns.after))]
        return turn[turn.index(NAMES[0]) + len(NAMES[0]) :]

    middle, ending = _around(behind_name({_KEY: _TEXT}))
    _, following = _around(behind_name({_KEY: _TEXT, "omega": "SENTINEL1"}))
    following = following[: following.index("omega")]
    end = common_start(following, ending)
    upcoming, ending = following[len(end) :], ending[len(end) :]
    if _KEY in end + upcoming + ending:
        raise NotDerivable("what closes an argument holds its name")
    last, gap, closing = _behind_last(turns, calls, behind_name, end, ending)
    none = behind_name({})
    if not none.endswith(closing):
        raise NotDerivable("calls without arguments end in another way")
    none = none[: len(none) - len(closing)]
    if not closing.strip():  # blanks at the end belong to what may follow
        blanks = last[len(last.rstrip()) :]
        last, none, closing = last.rstrip(), none.rstrip(), blanks + closing
        gap = segment(blanks, ()) + gap if gap is not None else None
    order = behind_name({"omega": "SENTINEL1", _KEY: _TEXT})

    def written(value: Any) -> str:
        """What stands between a name of an argument and what stands behind the last one."""
        text = behind_name({_KEY: value})
        if not text.endswith(last + closing):
            raise NotDerivable("arguments of some type end in another way")
        return text[text.index(_KEY) + len(_KEY) : len(text) - len(last + closing)]

    middles, ends = {"string": middle}, {"string": end}
    for kind, (sample, pattern) in _SAMPLES.items():
        if match := re.search(pattern, text := written(sample)):
            middles[kind], ends[kind] = text[: match.start()], text[match.end() :]
    values, mark = _values(written, middles, ends)
    words = {
        word: written(value)[len(middles[kind]) :].removesuffix(ends[kind])
        for word, value in _WORDS.items()
        if (kind := json_type(value)) in middles
    }
    arguments = Parameters(
        before=calls.arguments.before,
        next=upcoming,
        middle=middles,
        end=ends,
        none=_numbered(segment(none, turns.ids, NAMES[0]), calls.arguments.before),
        last=last,
        values=values,
        words=words,
        mark=mark,
        sorted=order.index(_KEY) < order.index("omega"),
    )
    return replace(calls, arguments=arguments, gap=gap, closing=segment(closing, turns.ids), origin="parameters")


def _around(text: str) -> tuple[str, str]:
    """What stands between the argument's name and value, and behind that."""
    _, _, rest = text.partition(_KEY)
    middle, separator, after = rest.partition(_TEXT)
    if not separator:
        raise NotDerivable("it does not render arguments by their names")
    return middle, after


def _behind_last(
    turns: Turns, calls: CallFormat, behind_name: Callable[..., str], end: str, ending: str
) -> tuple[str, Segment | None, str]:
    """(what stands behind a last argument in any case, what leads to the next call from there, what ends it all)."""
    if calls.gap is None:
        return "", None, ending
    _, rest = _around(behind_name({_KEY: _TEXT}, {_KEY: "SENTINEL1"}))
    between = rest[: rest.index(NAMES[1])]
    if not between.startswith(end):
        raise NotDerivable("its last argument ends in another way before a call")
    last = common_start(between[len(end) :], ending)
    gap, known = between[len(end) + len(last) :], calls.gap
    if isinstance(known[0], str) and len(known) > 1:  # with holes: what is cut off stands in front of them
        rest_of = known[0][len(end) + len(last) :]
        return last, ((rest_of, *known[1:]) if rest_of else known[1:]), ending[len(last) :]
    return last, segment(gap, turns.ids), ending[len(last) :]


def _numbered(none: Segment, before: Segment) -> Segment:
    if Hole.INDEX not in before:
        return none
    zero, one = with_index(none, 0), with_index(none, 1)
    return zero if Hole.INDEX in zero else one


def _values(written: Callable[[Any], str], middles: dict[str, str], ends: dict[str, str]) -> tuple[str, str]:
    """How values are written, as literals.py has it, and the mark around texts. Takes quotes out of `middles` and
    `ends` where they belong to the values. Raises NotDerivable."""
    middle, end = middles["string"], ends["string"]
    nasty = written(_NASTY)
    if nasty not in (middle + _NASTY + end, f"{middle}<![CDATA[{_NASTY}]]>{end}"):
        quoted = middle[-1:] in ("'", '"') and end[:1] == middle[-1:]
        bare, rest = (middle[:-1], end[1:]) if quoted else (middle, end)
        try:
            if read(nasty[len(bare) : len(nasty) - len(rest)], False, "python") == _NASTY:
                middles["string"], ends["string"] = bare, rest
                return "python", ""
        except Unreadable:
            pass
        raise NotDerivable("texts are written in a way that cannot be read back")
    if "object" in middles:
        nested = written(_NESTED)[len(middles["object"]) :].removesuffix(ends["object"])
        for values, mark in (("raw", ""), ("marked", end)):
            try:
                if read(nested, False, values, mark) == _NESTED:
                    break
            except Unreadable:
                continue
        else:
            raise NotDerivable("objects are written in a way that cannot be read back")
        if values == "marked":
            middles["string"], ends["string"] = middle.removesuffix(mark), ""
            return values, mark
    return "raw", ""
