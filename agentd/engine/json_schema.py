"""JSON schemas that constrain an answer: within bounds, and obeyed in full. Pure."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from agentd.engine.json_patterns import NotPortable, portable
from agentd.errors import ConstraintTooComplex, InvalidRequest

_LONGEST = 1 << 18  # characters of a schema
_NODES = 10_000  # of a schema
_DEEP = 64
_REMAINDERS = 10_000  # of multipleOf that are told apart: for each of them llguidance has states

# As llama.cpp has it: one blank, or a new line and what is indented; unbounded, a model may go on with blanks for ever.
WHITESPACE = r"[ ]|\n[ \t]{0,20}"
_EXACT = 1 << 53
"""Up to here llguidance tells integers apart; those of constants near -2^63 end the process that compiles them."""
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_TYPES = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))
_KINDS: dict[str, type] = {
    **dict.fromkeys(
        ("$anchor", "$comment", "$id", "$ref", "$schema", "description", "format", "pattern", "title"), str
    ),
    **dict.fromkeys(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"), dict),
    **dict.fromkeys(("allOf", "anyOf", "enum", "oneOf", "prefixItems", "required"), list),
}
_WORDS: dict[type, str] = {str: "a text", dict: "an object", list: "a list"}
_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "not": (False,),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ({},)),
    **dict.fromkeys(("propertyNames", "unevaluatedItems", "unevaluatedProperties", "additionalItems"), (True, {})),
}
"""Keywords that llguidance has not, with the values that ask for nothing."""
# Keywords that llguidance passes over although they say something about what is valid.
_PASSED_OVER = frozenset(
    ("$recursiveRef", "additionalItems", "dependencies", "disallow", "divisibleBy", "extends", "x-guidance")
)
_DAY = (
    "[1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR}:[0-5][0-9]([.][0-9]{{1,6}})?(Z|[+-]{_HOUR})"
_HOST = "[a-z0-9]{1,16}(-[a-z0-9]{1,16}){0,2}"  # two hyphens in a row may claim to be Punycode (RFC 5891)
_HEXES = "[0-9a-f]"
_FORMATS = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "hostname": f"({_HOST}[.]){{0,3}}[a-z][a-z0-9]{{0,11}}",
    "base64": "([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    **{
        f"uuid{n}": f"{_HEXES}{{8}}-{_HEXES}{{4}}-{n}{_HEXES}{{3}}-[89ab]{_HEXES}{{3}}-{_HEXES}{{12}}"
        for n in range(1, 9)
    },
    "email": f"[A-Za-z0-9_+-]{{1,31}}([.][A-Za-z0-9_+-]{{1,31}})?@({_HOST}[.]){{1,3}}[a-z]{{2,12}}",
}
"""Formats whose expressions in llguidance let through what strict validators refuse: the 31st of February, parts of an
address of more than 64 characters (RFC 5321, RFC 3339). Each is a part of what the format allows."""
_ONE = (
    *("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_ANY_TEXT = frozenset(("binary", "directory-path", "file-path", "password", "path"))
"""Formats of OpenAPI and pydantic that say what a text is for."""
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def parse(text: str) -> Any:
    """A schema from its text. Raises InvalidRequest for one that is too large, or would not be obeyed in full."""
    if len(text) > _LONGEST:
        raise ConstraintTooComplex(f"the schema has {len(text)} characters, and may have {_LONGEST}")
    try:
        schema = json.loads(text)
        bound(schema)
        schema = sound(schema)
        if keyword := passed_over(schema):
            raise NotSound(f"{keyword} is not supported")
    except ValueError as error:
        raise InvalidRequest(f"cannot use this JSON schema: {error}", param="response_format") from None
    return schema


class NotSound(ValueError):
    """What cannot be compiled safely and as it is meant; the message says which part."""


def sound(schema: Any) -> Any:
    """The schema as llguidance is to have it: with formats as patterns, patterns that mean one thing, bounds within
    which it computes exactly. Raises NotSound."""
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for keyword, value in schema.items():
        if any(value is each or value == each != 0 for each in _ASKS_FOR_NOTHING.get(keyword, ())):
            continue
        _check(keyword, value)
        if keyword in _MAPS and isinstance(value, dict):
            names = map(_portable, value) if keyword == "patternProperties" else value
            made[keyword] = dict(zip(names, map(sound, value.values()), strict=True))
        elif keyword in _LISTS and isinstance(value, list):
            made[keyword] = [sound(each) for each in value]
        elif keyword in _ONE:
            made[keyword] = sound(value)
        elif keyword in (*_LOWER, *_UPPER) and isinstance(value, int | float) and not isinstance(value, bool):
            made[keyword] = _bound(keyword, value)
        else:
            made[keyword] = _portable(value) if keyword == "pattern" and value is not None else value
    form = made.get("format")
    if isinstance(form, str) and form in _ANY_TEXT:
        del made["format"]
    if isinstance(form, str) and form in _FORMATS and "pattern" not in made:
        del made["format"]
        made["pattern"] = f"^({_FORMATS[form]})$"
    return made


def _check(keyword: str, value: Any) -> None:
    """Raises NotSound for a value that the keyword cannot have."""
    kind = _KINDS.get(keyword)
    if kind is not None and value is not None and not isinstance(value, kind):
        raise NotSound(f"{keyword} must be {_WORDS[kind]}")
    if keyword == "type":
        named = value if isinstance(value, list) else [value]
        if unknown := next((name for name in named if not isinstance(name, str) or name not in _TYPES), None):
            raise NotSound(f"there is no type {json.dumps(unknown)[:80]}")
    elif keyword == "multipleOf" and isinstance(value, int | float) and value <= 0:
        raise NotSound("multipleOf must be greater than 0")
    elif keyword in ("const", "enum") and (number := _beyond(value)) is not None:
        raise NotSound(f"{keyword} has {number}, and numbers beyond 2^53 cannot be told apart")
    elif keyword == "$ref" and isinstance(value, str) and not _to_schema(value):
        raise NotSound(f"the $ref {value[:80]!r} leads to what is no schema")


def _to_schema(reference: str) -> bool:
    """Whether a reference by its path goes through keywords that hold schemas: what is elsewhere was not looked at."""
    path = unquote(reference.partition("#")[2]).split("/")[1:]
    while path:
        keyword, *path = path
        if keyword in _MAPS or (keyword in _LISTS and path[:1] and path[0].isdigit()):
            if not path:
                return False
            path = path[1:]
        elif keyword not in _ONE:
            return False
    return True


def _bound(keyword: str, value: float) -> float:
    """A bound up to which numbers are told apart; of one beyond, what it leaves of these. Raises NotSound for none."""
    if abs(value) <= _EXACT:
        return value
    if (value > 0) == (keyword in _LOWER):
        raise NotSound(f"{keyword} is {value}, and numbers beyond 2^53 cannot be told apart")
    return math.copysign(_EXACT, value) if isinstance(value, float) else _EXACT if value > 0 else -_EXACT


def _beyond(value: Any) -> float | None:
    """A number in a constant that would not come out as it is."""
    if isinstance(value, int | float):
        return None if abs(value) <= _EXACT else value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((number for each in inner if (number := _beyond(each)) is not None), None)


def _portable(pattern: str) -> str:
    try:
        return portable(pattern)
    except NotPortable as error:
        raise NotSound(f"the pattern {pattern[:80]!r} cannot be used: {error}") from None


def bound(schema: Any, nodes: int = _NODES) -> int:
    """The number of keywords in a schema. Raises ConstraintTooComplex where they are more than `nodes`, too deep, or
    ask for too many remainders."""
    n, divisors, combined = 0, {1}, False
    for n, (keyword, value) in enumerate(_keywords(schema, 0), 1):
        combined |= keyword in ("allOf", "$ref")
        if keyword == "multipleOf":
            divisors.add(_divisor(value))
        if n > nodes:
            raise ConstraintTooComplex(f"the schema has more than {nodes} keywords")
    if (math.lcm(*divisors) if combined else max(divisors)) > _REMAINDERS:
        raise ConstraintTooComplex(f"multipleOf asks for more than {_REMAINDERS} remainders to be told apart")
    return n


def _divisor(value: Any) -> int:
    """The remainders that decimal digits are told apart by for `multipleOf`: those of its digits without 2 and 5."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or not math.isfinite(value):
        return 1  # refused as such
    digits = int("".join(map(str, Decimal(str(value)).as_tuple().digits)))
    for factor in (2, 5):
        while digits % factor == 0:
            digits //= factor
    return digits


def passed_over(schema: Any) -> str | None:
    """A keyword that llguidance passes over although it says something about what is valid."""
    return next((keyword for keyword, _ in _keywords(schema, 0) if keyword in _PASSED_OVER), None)


def _keywords(schema: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Every keyword of a schema and of those inside it, with its value."""
    if not isinstance(schema, dict):
        return
    if depth > _DEEP:
        raise ConstraintTooComplex(f"the schema is nested more than {_DEEP} deep")
    for keyword, value in schema.items():
        yield keyword, value
        inner: list[Any] = []
        if keyword in _MAPS and isinstance(value, dict):
            inner = list(value.values())
        elif keyword in _LISTS and isinstance(value, list):
            inner = value
        elif keyword in _ONE:
            inner = [value]
        for each in inner:
            yield from _keywords(each, depth + 1)
