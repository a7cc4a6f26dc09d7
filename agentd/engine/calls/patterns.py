"""What the schema of an argument allows: types, constants, and texts as expressions of Rust's regex. Pure."""

from typing import Any

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
