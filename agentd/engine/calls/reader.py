"""Answers taken apart while they come: reasoning, text and calls, out of pieces of text cut anywhere. Pure."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentd.engine.calls import literals
from agentd.engine.calls.format import AnswerFormat, JsonArguments, Parameters
from agentd.engine.calls.patterns import alternatives, fits, kinds_of
from agentd.engine.calls.segments import MORE, match
from agentd.engine.protocol import CallDelta


@dataclass(frozen=True)
class Delta:
    """What has come since the last time."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class AnswerReader:
    """`tools` are the parameters' schemas of the functions that may be called, by name; without any, what looks like a
    call is text. `thinking`: the prompt ended within the reasoning."""

    def __init__(self, form: AnswerFormat, tools: Mapping[str, Any], *, thinking: bool = False) -> None:
        self._form, self._tools = form, tools
        self._names = sorted(tools, key=len, reverse=True)
        self._triggers = form.calls.triggers(list(tools)) if tools else []
        self._buffer = ""
        self._state = self._reason if thinking else self._say
        self._started = False  # something other than blanks was said
        self._blank = False  # blanks at the beginning of a part are no part of it
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[CallDelta] = []
        self._call: _Call | None = None
        self._id: str | None = None
        self.called = 0

    @property
    def speaking(self) -> bool:
        """Whether what comes next is text, as far as is known."""
        return self._state == self._say

    def feed(self, text: str) -> Delta:
        self._buffer += text
        while self._state(False):
            pass
        return self._taken()

    def flush(self, cut: bool = False) -> Delta:
        """What was held back, when nothing more will come. `cut`: more would have come; then the beginning of what
        tells parts apart is neither text nor reasoning."""
        if cut and (held := _held(self._buffer, self._marks())) < len(self._buffer):
            self._buffer = self._buffer[:held].rstrip()
        while self._state(True):
            pass
        rest, self._buffer = self._buffer, ""
        if self._state == self._reason:
            self._reasoning.append(rest)
        elif self._state == self._say:
            self._text.append(rest)
        return self._taken()

    def _taken(self) -> Delta:
        delta = Delta("".join(self._text), "".join(self._reasoning), tuple(self._calls))
        self._text, self._reasoning, self._calls = [], [], []
        return delta

    # --- text and reasoning; each state returns whether there may be more to do

    def _marks(self) -> list[str]:
        """The texts that tell where what comes now ends."""
        form = self._form
        if self._state == self._reason:
            return [form.reasoning.closing] if form.reasoning else []
        if self._state != self._say:
            return []
        marks = [] if form.calls.anchored and self._started else [*self._triggers]
        if form.reasoning and form.reasoning.opening and not self._started:
            marks += [form.reasoning.opening, form.reasoning.closing]
        if form.said:
            marks += [form.said.opening, form.said.closing]
        if not self._started:
            marks.append(form.calls.lead)
        return [mark for mark in marks if mark]

    def _reason(self, last: bool) -> bool:
        assert self._form.reasoning is not None
        closing = self._form.reasoning.closing
        self._skip_blanks()
        at = self._buffer.find(closing)
        if at < 0:
            if not last:
                held = _held(self._buffer, [closing])
                self._emit(self._reasoning, len(self._buffer[:held].rstrip()))
            return False
        self._reasoning.append(self._buffer[:at].rstrip())
        self._drop(at + len(closing))
        self._state, self._blank, self._started = self._say, True, False
        return True

    def _say(self, last: bool) -> bool:
        form = self._form
        self._skip_blanks()
        reasoning = form.reasoning.opening if form.reasoning else ""
        over = form.reasoning.closing if form.reasoning else ""
        marks = self._marks()
        places = [(at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0]
        if form.calls.anchored:  # not behind text
            places = [(at, mark) for at, mark in places if mark not in self._triggers or not self._buffer[:at].strip()]
        if not places:
            if not last:
                held = _held(self._buffer, marks)
                cut = len(self._buffer[:held].rstrip()) if self._triggers or form.said else held
                self._started = self._started or bool(self._buffer[:cut].strip())
                self._emit(self._text, cut)
            return False
        at, mark = min(places, key=lambda each: (each[0], -len(each[1])))
        if not last and any(len(each) > len(mark) and each.startswith(self._buffer[at:]) for each in marks):
            return False
        before = self._buffer[:at]
        self._started = self._started or bool(before.strip())
        if mark in self._triggers:
            self._text.append(before.rstrip())
            self._drop(at)
            self._state = self._open
        elif mark == reasoning and not self._started:
            self._drop(at + len(mark))
            self._state, self._blank = self._reason, True
        elif mark == over and not self._started:
            self._drop(at + len(mark))
            self._blank = True
        else:
            self._text.append(before.rstrip() if form.said and mark == form.said.closing else before)
            self._drop(at + len(mark))
            self._blank = mark == form.calls.lead or bool(form.said and mark == form.said.opening)
        return True

    def _skip_blanks(self) -> None:
        if self._blank and self._buffer:
            self._buffer = self._buffer.lstrip()
            self._blank = not self._buffer

    def _emit(self, to: list[str], n: int) -> None:
        if n:
            to.append(self._buffer[:n])
            self._drop(n)

    def _drop(self, n: int) -> None:
        self._buffer = self._buffer[n:]

    # --- calls

    def _open(self, last: bool) -> bool:
        end, self._id = match(self._form.calls.shared, self._buffer, 0)
        if end == MORE:
            return self._cut_off(last)
        if end < 0:
            return self._no_call()
        self._drop(end)
        self._state = self._name
        return True

    def _name(self, last: bool) -> bool:
        arguments = self._form.calls.arguments
        open_end = False
        for name in self._names:
            if not self._buffer.startswith(name):
                open_end = open_end or name.startswith(self._buffer)
                continue
            kinds = [(arguments.before, False)]
            if isinstance(arguments, Parameters):
                kinds.append((arguments.none, True))
            for before, empty in sorted(kinds, key=lambda kind: -len(str(kind[0]))):
                end, id = match(before, self._buffer, len(name), name)
                if end == MORE:
                    return self._cut_off(last)
                if end >= 0:
                    self._begin(name, id or self._id, empty, end)
                    return True
        return self._cut_off(last) if open_end else self._no_call()

    def _begin(self, name: str, id: str | None, empty: bool, end: int) -> None:
        self._calls.append(CallDelta(self.called, id or new_id(self._form), name))
        arguments = self._form.calls.arguments
        self._drop(end)
        if isinstance(arguments, JsonArguments):
            self._call, self._state = _Call(name), self._json
        elif empty:
            self._calls.append(CallDelta(self.called, arguments="{}"))
            self._call, self._state = _Call(name), self._between
        else:
            self._calls.append(CallDelta(self.called, arguments="{"))
            self._call, self._state = _Call(name), self._key

    def _no_call(self) -> bool:
        """What looked like one is text, the first character of it for certain."""
        self._text.append(self._buffer[:1])
        self._drop(1)
        self._started, self._state = True, self._say
        return bool(self._buffer)

    def _cut_off(self, last: bool) -> bool:
        """More has to come. Where nothing will, an answer was cut within the words of the format: they are no text."""
        if last:
            self._buffer = ""
        return False

    def _json(self, last: bool) -> bool:
        assert self._call is not None
        n = self._call.end_of_json(self._buffer)
        self._argument(self._buffer[: n if n >= 0 else len(self._buffer)])
        self._drop(n if n >= 0 else len(self._buffer))
        if n < 0:
            return False
        self._state = self._between
        return True

    def _argument(self, text: str) -> None:
        if text:
            self._calls.append(CallDelta(self.called, arguments=text))

    def _between(self, last: bool) -> bool:
        """Behind a call: another one, or the end of all."""
        calls = self._form.calls
        ends = []
        for segment, state in ((calls.gap, self._name), (calls.closing, self._say)):
            if not segment:
                continue
            end, id = match(segment, self._buffer, 0)
            ends.append(end)
            if end >= 0 and state == self._name:
                self._finish_call(end, state)
                self._id = id if calls.carries_ids else None
                return True
            if end >= 0 and ends[0] != MORE:
                self._finish_call(end, state)
                return True
        if MORE in ends:
            if last:  # the end of this call, or the beginning of another
                self._finish_call(len(self._buffer), self._say)
            return False
        if not self._buffer:
            return False
        self._finish_call(0, self._say)
        return True

    def _finish_call(self, end: int, state: Any) -> None:
        self._drop(end)
        self.called += 1
        self._state, self._blank, self._started = state, True, True

    # --- arguments one by one

    def _key(self, last: bool) -> bool:
        arguments, call = self._form.calls.arguments, self._call
        assert isinstance(arguments, Parameters)
        assert call is not None
        places = [
            (at, middle)
            for middle in dict.fromkeys(arguments.middle.values())
            if (at := self._buffer.find(middle)) >= 0
        ]
        if not places:
            return False
        at, middle = min(places, key=lambda each: (each[0], -len(each[1])))
        if not last and any(
            len(other) > len(middle) and other.startswith(self._buffer[at:]) for other in arguments.middle.values()
        ):
            return False
        call.key = self._buffer[:at]
        call.kinds = [kind for kind, text in arguments.middle.items() if text == middle]
        self._drop(at + len(middle))
        self._state = self._value
        return True

    def _value(self, last: bool) -> bool:
        arguments, call = self._form.calls.arguments, self._call
        assert isinstance(arguments, Parameters)
        assert call is not None
        ends = list(dict.fromkeys(arguments.end[kind] for kind in call.kinds))
        place = self._end_of_value(arguments, ends, last)
        if place is None:
            return False
        at, end, ended = place
        value = _read(self._buffer[:at], self._schemas(call), call.kinds, arguments)
        comma = ", " if call.written else ""
        call.written += 1
        self._argument(f"{comma}{json.dumps(call.key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}")
        self._drop(at + len(end))
        if ended:
            self._argument("}")
            self._drop(len(arguments.last))
            self._state = self._between
        else:
            self._drop(len(arguments.next))
            self._state = self._key
        return True

    def _end_of_value(self, arguments: Parameters, ends: Sequence[str], last: bool) -> tuple[int, str, bool] | None:
        """(where the value ends, what ends it, whether it was the last one); None where that is not known yet."""
        closing = self._closings(arguments)
        if arguments.values != "raw" or ends == [""]:
            kind = "marked" if arguments.values == "marked" else "python"
            at = literals.end_of(self._buffer, 0, kind, arguments.mark)
            if at < 0:
                return None
            for end in ends:
                for text, ended in [(end + arguments.next, False), *((end + each, True) for each in closing)]:
                    if self._buffer.startswith(text, at):
                        return at, end, ended
                    if text.startswith(self._buffer[at:]) and not last:
                        return None
            return None
        best: tuple[int, str, bool] | None = None
        for end in ends:
            for text, ended in [(end + arguments.next, False), *((end + each, True) for each in closing)]:
                at = self._buffer.find(text)
                if at >= 0 and (best is None or at < best[0]):
                    best = at, end, ended
                waiting = _held(self._buffer, [text])
                if not last and waiting < len(self._buffer) and best is not None and waiting < best[0]:
                    return None
        return best

    def _closings(self, arguments: Parameters) -> list[str]:
        """What may stand behind a last argument; more of it than `last`, where that is little or nothing."""
        calls = self._form.calls
        if arguments.last:
            return [arguments.last]
        texts = [segment[0] for segment in (calls.gap, calls.closing) if segment and isinstance(segment[0], str)]
        return texts or [""]

    def _schemas(self, call: "_Call") -> list[dict[str, Any]]:
        """Of which the value has one."""
        parameters = self._tools.get(call.name)
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        schema = properties.get(call.key, {}) if isinstance(properties, dict) else {}
        return [each if isinstance(each, dict) else {} for each in alternatives(schema, parameters)]


def _read(text: str, schemas: Sequence[dict[str, Any]], kinds: Sequence[str], arguments: Parameters) -> Any:
    """The value that stands as `text`, of a type that the format itself tells, or else one of the schemas."""
    told = arguments.values == "raw" and len(kinds) < len(arguments.middle)
    only_text = kinds == ["string"] if told else all(kinds_of(schema) == ["string"] for schema in schemas)
    try:
        value = literals.read(text, only_text, arguments.values, arguments.mark)
    except literals.Unreadable:
        return text
    if arguments.values == "raw" and not told and not any(fits(value, schema) for schema in schemas):
        return text if any("string" in kinds_of(schema) for schema in schemas) else value
    return value


class _Call:
    """Where the reading of a call's arguments stands."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key, self.kinds, self.written = "", list[str](), 0
        self._depth, self._quoted, self._escaped = 0, False, False

    def end_of_json(self, text: str) -> int:
        """Where the object ends in what comes next, or MORE."""
        for i, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = char == "\\", char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return MORE


def new_id(form: AnswerFormat) -> str:
    """An id as every template takes it that wants one of its own: nine letters (Mistral)."""
    if form.calls.ids:
        return "call_" + secrets.token_hex(12)
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return "".join(secrets.choice(alphabet) for _ in range(9))


def _held(text: str, marks: Sequence[str]) -> int:
    """Where the longest end of `text` begins that may become one of `marks`."""
    longest = 0
    for mark in marks:
        for n in range(min(len(text), len(mark) - 1), longest, -1):
            if text.endswith(mark[:n]):
                longest = n
                break
    return len(text) - longest
