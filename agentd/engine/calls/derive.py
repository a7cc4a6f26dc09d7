"""A model's own format of answers, read off its chat template by rendering conversations that differ in one thing."""

import json
import re
from collections.abc import Callable
from typing import Any

from agentd.engine.calls.format import AnswerFormat, Around, CallFormat, JsonArguments, Parameters
from agentd.engine.calls.parameters import block, derive_parameters
from agentd.engine.calls.probes import (
    NAMES,
    SAID,
    THOUGHT,
    VARIANTS,
    NotDerivable,
    NotRendered,
    Pieces,
    Turns,
    Variant,
    take_apart,
)
from agentd.engine.calls.reader import AnswerReader
from agentd.engine.calls.segments import Segment, common_end, common_start, segment, text_of, with_index
from agentd.engine.chat_template import ChatTemplate

_THINKING = (
    *(("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")),
    *(("<|START_THINKING|>", "<|END_THINKING|>"), ("<|inner_prefix|>", "<|inner_suffix|>")),
    *(("<|channel>thought", "<channel|>"), ("<reasoning>", "</reasoning>")),
)
"""Around the reasoning of templates that mention it and do not lay it out."""
_READ: tuple[dict[str, Any], ...] = ({"alpha": 'so "b" {c}', "beta": 7}, {}, {"alpha": "x"})
_READ_SCHEMA = {"type": "object", "properties": {"alpha": {"type": "string"}, "beta": {"type": "integer"}}}
_NO_CALLS = "it does not render calls"
_BARE = 4  # characters; a shorter text could open anything


def derive(template: ChatTemplate) -> AnswerFormat:
    """Raises NotDerivable saying why the template shows no format of calls."""
    reasons: list[NotDerivable] = []
    printed: AnswerFormat | None = None
    for variant in VARIANTS:
        try:
            form = _derive(template, variant)
            _check(form, Turns(template, variant))
        except NotDerivable as error:
            reasons.append(error)
            continue
        if not _prints_objects(form):
            return form
        printed = printed or form
    if printed:
        return printed
    raise max(reasons, key=lambda reason: (not isinstance(reason, NotRendered), str(reason) != _NO_CALLS))


def _check(form: AnswerFormat, turns: Turns) -> None:
    """Raises NotDerivable where the calls that the template renders are not read as what they are: it writes something
    about them that the probes did not show."""
    for arguments in (_READ[:1], _READ[1:2], _READ)[: 3 if form.calls.gap is not None else 2]:
        text = turns.answer(turns.calls(*arguments))
        text = text[: len(text) - len(common_end(text, turns.after))]
        thinking = form.thinks(turns.prompt) and form.reasoning is not None and form.reasoning.closing in text
        reader = AnswerReader(form, dict.fromkeys(NAMES, _READ_SCHEMA), thinking=thinking)
        calls: list[tuple[str, list[str]]] = []
        for delta in (*reader.feed(text).calls, *reader.flush().calls):
            if delta.name is not None:
                calls.append((delta.name, []))
            calls[delta.index][1].append(delta.arguments)
        try:
            read = [(name, json.loads("".join(parts))) for name, parts in calls]
        except ValueError:
            read = []
        if read != list(zip(NAMES, arguments, strict=False)):
            raise NotDerivable("the calls that it renders are not read back")


def _prints_objects(form: AnswerFormat) -> bool:
    """Whether arguments stand as Python prints a dictionary: the template was made for JSON as text."""
    arguments = form.calls.arguments
    return isinstance(arguments, Parameters) and arguments.middle["string"].strip() in ("':", '":')


def spans(template: ChatTemplate) -> tuple[Around | None, Around | None]:
    """What stands around reasoning, and around text. Raises NotDerivable."""
    return _spans(Turns(template, VARIANTS[0]), template.source)


def _spans(turns: Turns, source: str) -> tuple[Around | None, Around | None]:
    said = turns.answer(turns.before)
    reasoning = next((Around(opening, closing) for opening, closing in _THINKING if closing in source), None)
    try:
        turn = turns.answer(turns.thinking())
    except NotDerivable:
        turn = ""
    before, thought, rest = turn.partition(THOUGHT)
    if thought and SAID in rest:
        between = rest.split(SAID, 1)[0]
        opening = before.strip() or turns.prompt[len(common_start(turns.prompt, turns.before)) :].strip()
        if said.strip() and between != said and between.endswith(said):
            between = between[: -len(said)]
        if opening and between.strip():
            reasoning = Around(opening, between.strip())
    if reasoning:
        said = _without_reasoning(said, reasoning)
    if not said.strip():
        return reasoning, None
    closing = turns.after
    try:
        closing = turns.after[: len(turns.after) - len(common_end(turns.after, turns.calls({"alpha": "A"})))]
    except NotDerivable:
        closing = ""
    return reasoning, Around(said.strip(), closing.strip())


def _without_reasoning(text: str, reasoning: Around) -> str:
    """The text without reasoning in front that is empty."""
    opening, closing = re.escape(reasoning.opening), re.escape(reasoning.closing)
    return re.sub(rf"^\s*({opening})?\s*{closing}", "", text)


def _derive(template: ChatTemplate, variant: Variant) -> AnswerFormat:
    turns = Turns(template, variant)
    reasoning, said = _spans(turns, template.source)

    def body(turn: str) -> str:
        return _without_reasoning(turns.answer(turn), reasoning) if reasoning else turns.answer(turn)

    one = body(turns.calls(_arguments(0)))
    as_json = take_apart(one, 1, _object)
    if as_json is None and take_apart(one, 1, block) is None:
        raise NotDerivable(_NO_CALLS)
    pattern, arguments = (_object, _arguments) if as_json else (block, _texts)
    single = take_apart(body(turns.calls(arguments(0))), 1, pattern)
    assert single is not None
    several = _several(turns, body, pattern, arguments)
    pieces = several or single
    tail = pieces.tail[: len(pieces.tail) - len(common_end(pieces.tail, turns.after))]
    gaps, befores, opening = _segments(turns, pieces)
    later, alone, lead = _behind_text(turns, body, said)
    trigger, anchored = _trigger(turns, opening, later)
    calls = CallFormat(
        opening=opening,
        later=later if trigger else None,
        arguments=JsonArguments(befores),
        gap=gaps,
        closing=segment(tail, turns.ids),
        trigger=trigger,
        anchored=anchored,
        as_text=variant.as_text,
        ids=variant.ids,
        alone=alone,
        silence=variant.silence,
        lead=lead,
    )
    if not as_json:
        calls = derive_parameters(turns, calls, body)
    return AnswerFormat(calls, reasoning, said)


def _arguments(number: int) -> dict[str, Any]:
    return {"alpha": f"SENTINEL{number}", "beta": 7910 + number}


def _texts(number: int) -> dict[str, Any]:
    return {"alpha": f"SENTINEL{number}"}


def _object(number: int) -> str:
    return rf'\{{\s*"alpha"\s*:\s*"SENTINEL{number}"\s*,\s*"beta"\s*:\s*{7910 + number}\s*\}}'


def _several(
    turns: Turns, body: Callable[[str], str], pattern: Callable[[int], str], arguments: Callable[[int], dict[str, Any]]
) -> Pieces | None:
    """Three calls in one turn; None where the template has one at most."""
    try:
        return take_apart(body(turns.calls(*(arguments(i) for i in range(3)))), 3, pattern)
    except NotDerivable:
        return None


def _segments(turns: Turns, pieces: Pieces) -> tuple[Segment | None, Segment, Segment]:
    """(gap, what stands before arguments, opening), with holes where ids, names and numbers of calls stand."""
    opening = segment(pieces.before_name[0], turns.ids)
    befores = [segment(text, turns.ids, NAMES[i]) for i, text in enumerate(pieces.before_arguments)]
    gaps = [segment(text, turns.ids) for text in pieces.before_name[1:]]
    if not gaps:
        return None, befores[0], opening
    for first in (None, 0, 1):
        if first is not None:
            if len(set(befores)) > 1:
                befores = [with_index(each, first + i) for i, each in enumerate(befores)]
            if len(set(gaps)) > 1:
                gaps = [with_index(each, first + i + 1) for i, each in enumerate(gaps)]
                opening = with_index(opening, first)
        if len(set(befores)) == len(set(gaps)) == 1:
            return gaps[0], befores[0], opening
        befores = [segment(text, turns.ids, NAMES[i]) for i, text in enumerate(pieces.before_arguments)]
        gaps = [segment(text, turns.ids) for text in pieces.before_name[1:]]
        opening = segment(pieces.before_name[0], turns.ids)
    raise NotDerivable("its calls differ from one to the next")


def _behind_text(turns: Turns, body: Callable[[str], str], said: Around | None) -> tuple[Segment | None, bool, str]:
    """The opening behind text, whether calls are lost beside text, and what stands in front of text there alone."""
    try:
        turn = body(turns.calls(_arguments(0), content=SAID))
    except NotDerivable:
        return None, True, ""
    at, place = turn.find(SAID), turn.find(NAMES[0])
    if place < 0:
        return None, True, ""
    if not 0 <= at < place:
        return None, False, ""
    if (end := turns.after.strip()) and end in turn[at:place]:  # the text is a turn of its own
        return None, False, ""
    lead = turn[:at].strip()
    return segment(turn[at + len(SAID) : place], turns.ids), False, "" if said and lead == said.opening else lead


def _trigger(turns: Turns, opening: Segment, later: Segment | None) -> tuple[str, bool]:
    head = text_of(opening)
    if later:
        other = text_of(later)
        head = common_end(head, other) if len(opening) == len(later) else head
    head = head.lstrip()
    plain = turns.prompt + turns.before + turns.after
    for bracket in re.finditer(r"[>\]]", head):
        if bracket.end() >= _BARE and head[: bracket.end()] not in plain:
            return head[: bracket.end()], False
    bare = re.split(r"[\[{]", head, maxsplit=1)[0]
    if len(bare) >= _BARE:
        return bare, False
    return (head, True) if len(head) >= _BARE else ("", True)
