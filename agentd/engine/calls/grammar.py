"""The grammar of calls in a format: only declared functions, only arguments of their schemas. For llguidance (Lark)."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentd.engine.calls.format import AnswerFormat, JsonArguments, Parameters
from agentd.engine.calls.literals import json_type
from agentd.engine.calls.patterns import ANY, constants_of, flat, kinds_of, only_integers, text_patterns
from agentd.engine.calls.segments import Hole, Segment
from agentd.engine.json_schema import WHITESPACE, NotSound, bound, passed_over, sound
from agentd.errors import ConstraintTooComplex, InvalidRequest
from agentd.formats.tool_use import ToolUse

_NODES = 20_000  # keywords of all tools' schemas together
_PROPERTIES = 100  # of a function whose arguments stand one by one
_ID = "/[a-zA-Z0-9]{9}/"
_INDEX = "/0|[1-9][0-9]?/"
_WORDS = {"boolean": ("true", "false"), "null": ("null",)}
_EXPRESSION = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/\n\r\t]")


class CallGrammar:
    """Rules of the calls that `use` allows in this format. `controls` are the texts of control tokens and their
    numbers. Raises InvalidRequest for parameters that are no schema."""

    def __init__(self, form: AnswerFormat, use: ToolUse, controls: Mapping[str, int]) -> None:
        self._form, self._use = form, use
        self._controls = controls
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")")
        self._rules: list[str] = []
        self._nodes = 0
        if use.tools:
            self._calls()

    # --- whole answers

    def call(self) -> str:
        """What begins with a trigger: calls, and nothing else."""
        return self._text(f"start: {self._literal(self._form.calls.shared)} call")

    def whole(self, *, thinking: bool, may_think: bool, schema: Any = None) -> str:
        """A whole answer: one call at least, or else, where `schema` is given, a value of it. Without tools it must be
        given."""
        rules = list(self._rules)
        start = f"{self._literal(self._form.calls.opening)} call"
        if not self._use.tools:
            start = _json(schema, False)
        elif schema is not None:
            start = f"({start}) | {_json(schema, False)}"
        if reasoning := self._form.reasoning:
            thought = self._upto("thought", [ANY], reasoning.closing)
            if thinking:
                start = f"{thought} ({start})"
            elif may_think:
                start = f"({self._literal((reasoning.opening,))} {thought})? ({start})"
        text, self._rules = self._text(f"start: {start}"), rules
        return text

    def _text(self, start: str) -> str:
        return "\n".join([start, *self._rules])

    # --- calls

    def _calls(self) -> None:
        calls = self._form.calls
        end = self._literal(calls.closing)
        if calls.gap is not None and self._use.parallel:
            end = f"({self._literal(calls.gap)} call | {end})"
        self._rules.append(f"done: {end}")
        alternatives = []
        for i, (name, parameters) in enumerate(self._use.parameters.items()):
            schema = self._checked(name, parameters)
            arguments = self._form.calls.arguments
            if isinstance(arguments, JsonArguments):
                strict = name in self._use.strict
                before = self._literal((name, *arguments.before), name)
                self._rules.append(f"call_{i}: {before} {_json(schema, strict)} done")
            else:
                self._one_by_one(i, name, schema, arguments)
            alternatives.append(f"call_{i}")
        self._rules.append(f"call: {' | '.join(alternatives)}")

    def _checked(self, name: str, parameters: Any) -> Any:
        """The schema as it is to be obeyed. Raises InvalidRequest."""
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise InvalidRequest(f"tools: the parameters of {name!r} must be a schema of an object", param="tools")
        self._nodes += bound(parameters, _NODES)
        if self._nodes > _NODES:
            raise ConstraintTooComplex(f"the tools' schemas have more than {_NODES} keywords")
        try:
            schema = sound(closed({**parameters, "type": "object"}))
        except NotSound as error:
            raise InvalidRequest(f"tools: the parameters of {name!r}: {error}", param="tools") from None
        if name in self._use.strict and (keyword := passed_over(schema)):
            raise InvalidRequest(f"tools: {name!r} is strict, and {keyword} is not supported", param="tools")
        return schema

    # --- arguments one by one

    def _one_by_one(self, number: int, name: str, schema: Any, arguments: Parameters) -> None:
        properties = schema.get("properties") or {}
        if not isinstance(properties, dict):
            raise InvalidRequest(f"tools: the properties of {name!r} must be an object", param="tools")
        if len(properties) > _PROPERTIES:
            raise ConstraintTooComplex(f"{name!r} has more than {_PROPERTIES} parameters")
        required = schema.get("required") or []
        if missing := [key for key in required if key not in properties]:
            raise InvalidRequest(f"tools: {name!r} requires {missing[0]!r} and may not have it", param="tools")
        for middle in filter(None, arguments.middle.values()):
            if unclear := next((key for key in properties if middle in key), None):
                raise InvalidRequest(f"tools: this model's calls have no form for the name {unclear!r}", param="tools")
        keys = sorted(properties) if arguments.sorted else list(properties)
        optional = [key not in required for key in keys]
        items = []
        for i, key in enumerate(keys):
            value = _Values(self, arguments, schema, f"v_{number}_{i}").rule(properties[key])
            items.append(f"{self._literal((key,))} {value}")
            self._rules.append(f"item_{number}_{i}: {items[-1]}")

        def following(i: int, lead: str) -> Iterator[str]:
            """What may stand at the i-th property: it or one behind it, or the end."""
            for j in range(i, len(keys)):
                yield f"{lead} item_{number}_{j} tail_{number}_{j + 1}"
                if not optional[j]:
                    return

        for i in range(len(keys) + 1):
            ways = list(following(i, self._literal((arguments.next,))))
            if all(optional[i:]):
                ways.append(f"{self._literal((arguments.last,))} done")
            self._rules.append(f"tail_{number}_{i}: {' | '.join(ways)}")
        ways = list(following(0, self._literal((name, *arguments.before), name)))
        if all(optional):
            ways.append(f"{self._literal((name, *arguments.none), name)} done")
        self._rules.append(f"call_{number}: {' | '.join(ways)}")

    # --- terminals

    def _upto(self, rule: str, patterns: Sequence[str], end: str) -> str:
        """A text that all of the patterns describe, up to the first `end`, in a rule of that name."""
        head, rest = self._until_control(end)
        name, closing = rule.upper(), _escaped(head)
        self._rules.append(f"{rule}[lazy]: {name}" if head else f"{rule}: {name}")
        terms = [f"/{pattern}{closing}/" for pattern in patterns]
        if head and patterns != [ANY]:  # the first end is the end, though the text would not do yet
            terms.append(f"~/{ANY}{closing}(?s:.+)/")
        self._rules.append(f"{name}: {' & '.join(terms)}")
        return f"{rule} {rest}".strip()

    def _until_control(self, text: str) -> tuple[str, str]:
        """A text up to its first control token, and the grammar of the rest."""
        match = self._split.search(text) if self._controls else None
        if match is None:
            return text, ""
        return text[: match.start()], self._literal((text[match.start() :],))

    def _literal(self, segment: Segment, name: str = "") -> str:
        """Fixed texts, of which control tokens are tokens."""
        joined: list[str] = []
        for part in segment:
            if part is Hole.ID:
                joined.append(_ID)
            elif part is Hole.INDEX:
                joined.append(_INDEX)
            else:
                text = name if part is Hole.NAME else str(part)
                for each in self._split.split(text) if self._controls else [text]:
                    if each in self._controls:
                        joined.append(f"<[{self._controls[each]}]>")
                    elif each and joined and joined[-1].startswith('"'):
                        joined[-1] = json.dumps(json.loads(joined[-1]) + each, ensure_ascii=False)
                    elif each:
                        joined.append(json.dumps(each, ensure_ascii=False))
        return " ".join(joined) or '""'


class _Values:
    """Rules of one argument's value."""

    def __init__(self, grammar: CallGrammar, arguments: Parameters, root: Any, rule: str) -> None:
        self._grammar, self._arguments, self._rule, self._n = grammar, arguments, rule, 0
        self._root = root
        self._definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}

    def rule(self, schema: Any) -> str:
        """What stands between an argument's name and what follows it."""
        if self._arguments.values == "marked":
            return f"({self._between('string', self._marked(schema))})"
        ways = list(dict.fromkeys(self._ways(schema, 0)))
        return f"({' | '.join(ways)})"

    def _between(self, kind: str, value: str) -> str:
        arguments, literal = self._arguments, self._grammar._literal
        return f"{literal((arguments.middle[kind],))} {value} {literal((arguments.end[kind],))}"

    def _ways(self, schema: Any, depth: int) -> Iterator[str]:
        schema = self._resolved(schema)
        if schema is False:
            raise InvalidRequest("tools: nothing satisfies the schema of an argument", param="tools")
        if not isinstance(schema, dict):
            schema = {}
        for several in ("anyOf", "oneOf"):
            if isinstance(schema.get(several), list) and schema[several] and depth < 8:
                if several == "oneOf" and (kinds := self._objects_of(schema)):
                    for kind in kinds:
                        yield from self._of_kind(kind, {**schema, "type": kind})
                    return
                self._one_of(schema, several)
                for each in schema[several]:
                    rest = {key: value for key, value in schema.items() if key != several}
                    yield from self._ways({**rest, **each} if isinstance(each, dict) else each, depth + 1)
                return
        for kind in kinds_of(schema):
            if kind not in self._arguments.middle:
                raise InvalidRequest(f"tools: this model's calls have no form for a {kind}", param="tools")
            yield from self._of_kind(kind, schema)

    def _of_kind(self, kind: str, schema: dict[str, Any]) -> Iterator[str]:
        arguments = self._arguments
        listed = schema["enum"] if isinstance(schema.get("enum"), list) else None
        if "const" in schema:
            listed = [schema["const"]]
        if kind == "string" and arguments.values == "raw":
            middle = self._grammar._literal((arguments.middle["string"],))
            if listed is not None:
                for each in listed:
                    if isinstance(each, str):
                        yield f"{middle} {self._grammar._literal((each + arguments.end['string'],))}"
                return
            self._n += 1
            rule = f"{self._rule}_{self._n}"
            yield f"{middle} {self._grammar._upto(rule, text_patterns(schema), arguments.end['string'])}"
            return
        if kind in ("boolean", "null"):
            words = _WORDS[kind]
            if listed is not None:
                words = tuple(
                    word
                    for word in words
                    if json.loads(word) in [v for v in listed if v is None or v is True or v is False]
                )
            for word in words:
                yield self._between(kind, self._grammar._literal((arguments.words.get(word, word),)))
            return
        of_kind = {**schema, "type": "integer" if only_integers(schema) and kind == "number" else kind}
        if listed is not None:
            of_kind["enum"] = [each for each in listed if json_type(each) == kind]
            of_kind.pop("const", None)
            if not of_kind["enum"]:
                return
        yield self._between(kind, _json({**of_kind, **self._definitions}, False))

    def _resolved(self, schema: Any) -> Any:
        """With what a reference within the parameters names, and all parts of an allOf."""
        try:
            return flat(schema, self._root)
        except ValueError as error:
            raise InvalidRequest(f"tools: this model's calls have no form for this {error}", param="tools") from None

    def _objects_of(self, schema: dict[str, Any]) -> list[str]:
        """The kinds of a oneOf of objects and lists, which stand as JSON: llguidance tells them apart. Else none."""
        listed = [self._resolved(each) for each in schema["oneOf"]]
        kinds = {kind for each in listed for kind in kinds_of(each if isinstance(each, dict) else {})}
        return sorted(kinds) if kinds <= {"object", "array"} else []

    def _one_of(self, schema: dict[str, Any], several: str) -> None:
        """Raises InvalidRequest where more than one of several could hold, which is not one of them."""
        listed = [self._resolved(each) for each in schema[several]]
        kinds = [kind for each in listed for kind in kinds_of(each if isinstance(each, dict) else {})]
        constants = [constants_of(each) for each in listed]
        values = [json.dumps(value, sort_keys=True) for each in constants for value in each or ()]
        apart = len(kinds) == len(set(kinds)) or (None not in constants and len(values) == len(set(values)))
        if several == "oneOf" and not apart:
            raise InvalidRequest(
                "tools: this model's calls have no form for a oneOf whose parts are not told apart by their types or "
                "constants; use anyOf",
                param="tools",
            )

    # --- texts between marks (see literals.py)

    def _marked(self, schema: Any, depth: int = 0) -> str:
        grammar, mark = self._grammar, self._arguments.mark
        schema = self._resolved(schema)
        schema = schema if isinstance(schema, dict) else {}
        for several in ("anyOf", "oneOf"):
            if isinstance(schema.get(several), list) and schema[several] and depth < 8:
                self._one_of(schema, several)
                return "(" + " | ".join(self._marked(each, depth + 1) for each in schema[several]) + ")"
        if isinstance(schema.get("enum"), list) or "const" in schema:
            listed = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]]
            return "(" + " | ".join(self._marked_constant(each) for each in listed) + ")"
        ways = []
        for kind in kinds_of(schema):
            if kind == "string":
                self._n += 1
                head = grammar._literal((mark,))
                ways.append(f"{head} {grammar._upto(f'{self._rule}_{self._n}', text_patterns(schema), mark)}")
            elif kind == "array":
                ways.append(self._marked_array(schema, depth))
            elif kind == "object":
                ways.append(self._marked_object(schema, depth))
            elif kind in ("boolean", "null"):
                words = [self._arguments.words.get(word, word) for word in _WORDS[kind]]
                ways.append("(" + " | ".join(map(json.dumps, words)) + ")")
            else:
                ways.append(_json({**schema, "type": "integer" if only_integers(schema) else "number"}, False))
        return "(" + " | ".join(ways) + ")"

    def _marked_array(self, schema: dict[str, Any], depth: int) -> str:
        for keyword in ("prefixItems", "contains", "uniqueItems"):
            if schema.get(keyword):
                raise InvalidRequest(f"tools: this model's calls have no form for {keyword}", param="tools")
        low, high = schema.get("minItems") or 0, schema.get("maxItems")
        if not all(isinstance(limit, int) and 0 <= limit < 1 << 10 for limit in (low, 0 if high is None else high)):
            raise InvalidRequest("tools: minItems and maxItems are numbers below 1024", param="tools")
        if high == 0 or (depth >= 4 and not low):
            return '"[" "]"'
        if depth >= 4:
            raise InvalidRequest("tools: this model's calls have no form for what is nested so deep", param="tools")
        each = self._marked(schema.get("items"), depth + 1)
        more = "*" if low < 2 and high is None else f"{{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        values = f'{each} ("," {each}){more}'
        return f'"[" {values} "]"' if low else f'"[" ({values})? "]"'

    def _marked_object(self, schema: dict[str, Any], depth: int) -> str:
        properties = schema.get("properties")
        required = schema.get("required") or []
        if depth >= 4 and required:
            raise InvalidRequest("tools: this model's calls have no form for what is nested so deep", param="tools")
        if not isinstance(properties, dict) or not properties or depth >= 4:
            return '"{" "}"'
        grammar = self._grammar
        keys = sorted(properties) if self._arguments.sorted else list(properties)
        items = {key: f"{grammar._literal((key + ':',))} {self._marked(properties[key], depth + 1)}" for key in keys}
        needed = [items[key] for key in items if key in required]
        first = ' "," '.join(needed)
        rest = "".join(f' ("," {items[key]})?' for key in items if key not in required)
        if not needed:
            ways = [items[key] for key in items]
            return '"{" (' + " | ".join(ways) + ')? "}"'
        return '"{" ' + first + rest + ' "}"'

    def _marked_constant(self, value: Any) -> str:
        return self._grammar._literal((self._written(value),))

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return self._arguments.mark + value + self._arguments.mark
        if isinstance(value, list):
            return "[" + ",".join(map(self._written, value)) + "]"
        if isinstance(value, dict):
            keys = sorted(value) if self._arguments.sorted else list(value)
            return "{" + ",".join(f"{key}:{self._written(value[key])}" for key in keys) + "}"
        word = json.dumps(value)
        return self._arguments.words.get(word, word)


def closed(schema: Any) -> Any:
    """The schema without properties that are not declared, where it says nothing about them: a part of what it
    allows, in which a model does not lose itself."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed_schema = {
        key: value if key in ("enum", "const", "default", "examples") else closed(value)
        for key, value in schema.items()
    }
    others = ("additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref")
    if isinstance(schema.get("properties"), dict):
        closed_schema["properties"] = {key: closed(value) for key, value in schema["properties"].items()}
        if not any(key in schema for key in others) and schema.get("type", "object") == "object":
            closed_schema["additionalProperties"] = False
        if isinstance(required := schema.get("required"), list) and "patternProperties" not in schema:
            more = closed_schema.get("additionalProperties", {}) if "additionalProperties" in schema else {}
            undeclared = [name for name in required if isinstance(name, str) and name not in schema["properties"]]
            if more is not False:
                closed_schema["properties"] |= dict.fromkeys(undeclared, more)
    return closed_schema


def _json(schema: Any, strict: bool) -> str:
    options = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
    extended = {**schema, "x-guidance": options} if isinstance(schema, dict) else schema
    return "%json " + json.dumps(extended)


def _escaped(text: str) -> str:
    return "".join(f"\\x{{{ord(char):X}}}" if _EXPRESSION.match(char) else char for char in text)
