"""What the schema of an argument allows: types, constants, and texts as expressions of Rust's regex. Pure."""

from typing import Any
from urllib.parse import unquote

from agentd.engine.calls.literals import json_type
from agentd.errors import InvalidRequest

ANY = r"(?s:.*)"
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r"}  # parts of what any validator takes for them
_ESCAPED = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def _of_whole_text(pattern: str) -> str:
    """The expression that whole texts match in which `pattern` is found, in the words of Rust's regex. Raises
    InvalidRequest for what has none: looking around, boundaries, back references, anchors in the middle."""
    alternatives, body, depth, at = list[str](), "", 0, 0
    starts, ends, in_class = False, False, False

    def refuse(what: str) -> InvalidRequest:
        return InvalidRequest(f"tools: the pattern {pattern[:80]!r} has {what}, which is not supported", param="tools")

    def close() -> None:
        alternatives.append(f"{'' if starts else ANY}(?:{body}){'' if ends else ANY}")

    while at < len(pattern):
        char, rest = pattern[at], pattern[at + 1 :]
        at += 1
        if ends and not (char == "|" and depth == 0):
            raise refuse("an anchor in the middle")
        if char == "\\":
            at += 1
            if rest[:1] in _CLASSES:
                body += _CLASSES[rest[0]] if in_class else f"[{_CLASSES[rest[0]]}]"
            elif rest[:1] == "u":
                body, at = body + f"\\x{{{rest[1:5]}}}", at + 4
            elif not rest or rest[0] in "bBAzZkc123456789":
                raise refuse("a boundary or a back reference")
            else:
                body += char + rest[0]
        elif in_class:
            in_class = char != "]" or body.endswith(("[", "[^"))
            body += r"\[" if char == "[" else _ESCAPED.get(char, char)
        elif char == "^" or char == "$":
            if depth or (char == "^" and body):
                raise refuse("an anchor in the middle")
            starts, ends = starts or char == "^", ends or char == "$"
        elif char == "|" and depth == 0:
            close()
            body, starts, ends = "", False, False
        else:
            if char == "(" and rest.startswith("?") and not rest.startswith("?:"):
                raise refuse("a group that looks around or has a name")
            depth += (char == "(") - (char == ")")
            in_class = char == "["
            body += _ESCAPED.get(char, char)
    close()
    return f"(?:{'|'.join(alternatives)})"


_SAID = frozenset(("$comment", "default", "deprecated", "description", "example", "examples", "title"))
_HIGHER = frozenset(("minimum", "exclusiveMinimum", "minLength", "minItems"))
_LOWER = frozenset(("maximum", "exclusiveMaximum", "maxLength", "maxItems"))
_DEPTH = 8


def flat(schema: Any, root: Any, depth: int = 0) -> Any:
    """The schema with all that its `$ref` and `allOf` say in one. Raises ValueError naming a keyword of which they say
    two things."""
    if not isinstance(schema, dict) or ("$ref" not in schema and not isinstance(schema.get("allOf"), list)):
        return schema
    if depth > _DEPTH:
        raise ValueError("$ref")
    made = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
    parts = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
    if "$ref" in schema:
        parts.insert(0, _target(schema["$ref"], root))
    for part in parts:
        each = flat(part, root, depth + 1)
        if not isinstance(each, dict):
            if each is False:
                return False
            continue
        for key, value in each.items():
            if key in made and made[key] != value and key not in _SAID:
                value = _both(key, made[key], value)
            if key not in made or key not in _SAID:
                made[key] = value
    return made


def _target(reference: Any, root: Any) -> Any:
    target = root
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise ValueError("$ref")
    for part in filter(None, unquote(reference[1:]).split("/")):
        part = part.replace("~1", "/").replace("~0", "~")
        inner = target[int(part)] if isinstance(target, list) and part.isdigit() and int(part) < len(target) else None
        target = target.get(part) if isinstance(target, dict) else inner
    if not isinstance(target, dict | bool):
        raise ValueError("$ref")
    return target


def _both(key: str, one: Any, other: Any) -> Any:
    """What holds where both do."""
    if key == "type":
        kinds, others = ([each] if isinstance(each, str) else list(each) for each in (one, other))
        both = [kind for kind in kinds if kind in others or (kind == "integer" and "number" in others)]
        both += [kind for kind in others if kind == "integer" and "number" in kinds and kind not in both]
        if both:
            return both[0] if len(both) == 1 else both
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    if numbers and key in _HIGHER:
        return max(one, other)
    if numbers and key in _LOWER:
        return min(one, other)
    if key == "required" and isinstance(one, list) and isinstance(other, list):
        return list(dict.fromkeys([*one, *other]))
    if key == "enum" and isinstance(one, list) and isinstance(other, list):
        return [each for each in one if each in other]
    raise ValueError(key)


def alternatives(schema: Any, root: Any, depth: int = 0) -> list[Any]:
    """The schemas of which one must hold, without references. One that nothing is known of is {}."""
    try:
        schema = flat(schema, root, depth)
    except ValueError:
        return [{}]
    if not isinstance(schema, dict):
        return [] if schema is False else [{}]
    for several in ("anyOf", "oneOf"):
        if isinstance(schema.get(several), list) and schema[several] and depth < _DEPTH:
            rest = {key: value for key, value in schema.items() if key != several}
            ways = [{**rest, **each} if isinstance(each, dict) else each for each in schema[several]]
            return [each for way in ways for each in alternatives(way, root, depth + 1)]
    return [schema]


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of the type and size that a schema says, as far as one sees at once."""
    if json_type(value) not in kinds_of(schema):
        return False
    constants = constants_of(schema)
    if constants is not None and not any(type(each) is type(value) and each == value for each in constants):
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    limits = [schema.get(key) for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")]
    low, high, above, below = (each if isinstance(each, int | float) else None for each in limits)
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
        and not (only_integers(schema) and value != int(value))
    )


def kinds_of(schema: dict[str, Any]) -> list[str]:
    """The JSON types that a schema allows; integers are numbers."""
    declared = schema.get("type")
    if declared is None:
        listed = (
            schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
        )
        if listed is not None:
            return list(dict.fromkeys(map(json_type, listed)))
        if "properties" in schema:
            return ["object"]
        return ["string", "number", "boolean", "null", "array", "object"]
    kinds = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys("number" if kind == "integer" else str(kind) for kind in kinds))


def constants_of(schema: Any) -> list[Any] | None:
    """The values of a schema that lists them."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def text_patterns(schema: dict[str, Any]) -> list[str]:
    """The patterns of a text of that length and form."""
    patterns = [_of_whole_text(schema["pattern"])] if isinstance(schema.get("pattern"), str) else []
    low, high = schema.get("minLength"), schema.get("maxLength")
    if not low and high is None:
        return patterns or [ANY]
    if not all(limit is None or (isinstance(limit, int) and 0 <= limit < 1 << 16) for limit in (low, high)):
        raise InvalidRequest("tools: minLength and maxLength are numbers below 65536", param="tools")
    return [f"(?s:.{{{low or 0},{'' if high is None else high}}})", *patterns]


def only_integers(schema: dict[str, Any]) -> bool:
    declared = schema.get("type")
    return declared == "integer" or (isinstance(declared, list) and "integer" in declared and "number" not in declared)
