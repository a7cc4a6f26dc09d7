"""JSON schemas that constrain an answer: within bounds, and obeyed in full. Pure."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from agentd.errors import ConstraintTooComplex, InvalidRequest

_LONGEST = 1 << 18  # characters of a schema
_NODES = 10_000  # of a schema
_DEEP = 64
_REMAINDERS = 10_000  # of multipleOf that are told apart: for each of them llguidance has states

# As llama.cpp has it: one blank, or a new line and what is indented; unbounded, a model may go on with blanks for ever.
WHITESPACE = r"[ ]|\n[ \t]{0,20}"
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
_FORMATS = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "hostname": f"({_HOST}[.]){{0,3}}[a-z][a-z0-9]{{0,11}}",
    "email": f"[A-Za-z0-9_+-]{{1,31}}([.][A-Za-z0-9_+-]{{1,31}})?@({_HOST}[.]){{1,3}}[a-z]{{2,12}}",
}
"""Formats whose expressions in llguidance let through what strict validators refuse: the 31st of February, parts of an
address of more than 64 characters (RFC 5321, RFC 3339). Each is a part of what the format allows."""
_ONE = ("additionalProperties", "items")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("$defs", "definitions", "patternProperties", "properties")


def parse(text: str) -> Any:
    """A schema from its text. Raises InvalidRequest for one that is too large, or would not be obeyed in full."""
    if len(text) > _LONGEST:
        raise ConstraintTooComplex(f"the schema has {len(text)} characters, and may have {_LONGEST}")
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"cannot use this JSON schema: it is no JSON: {error}", param="response_format") from None
    bound(schema)
    if keyword := passed_over(schema):
        raise InvalidRequest(f"cannot use this JSON schema: {keyword} is not supported", param="response_format")
    return with_strict_formats(schema)


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


def with_strict_formats(schema: Any) -> Any:
    """The schema with `_FORMATS` as patterns."""
    if not isinstance(schema, dict):
        return schema
    strict = {}
    for keyword, value in schema.items():
        if keyword in _MAPS and isinstance(value, dict):
            value = {name: with_strict_formats(each) for name, each in value.items()}
        elif keyword in _LISTS and isinstance(value, list):
            value = [with_strict_formats(each) for each in value]
        elif keyword in _ONE:
            value = with_strict_formats(value)
        strict[keyword] = value
    form = strict.get("format")
    if isinstance(form, str) and form in _FORMATS and "pattern" not in strict:
        del strict["format"]
        strict["pattern"] = f"^({_FORMATS[form]})$"
    return strict


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
