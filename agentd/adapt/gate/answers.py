"""Holdout answered as it is served: by what serves and by the candidate, within the time that the gate has for it.

Tasks with a generated metric have their holdout answered. Where tools are declared and none has to be called, messages
that want no call are answered besides: those of the holdout, and small talk with the task's tools.

An answer ends where no more of it counts. Who has begun to talk calls no tool any more, or does so soon: of a text only
the first tokens are awaited, and of a call where none is wanted only that it is one.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentd.adapt.gate.gate import NoCall, Outcome
from agentd.adapt.planning import small_talk
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.adapt.planning.small_talk import calls, is_free, last_said
from agentd.engine.operations import Answer, Answered
from agentd.engine.process.supervisor import Supervisor
from agentd.learn import metrics

_FEW = 10  # messages of a task's own that want no call, below which small talk is asked though no one calls
_TALK_TOKENS = 8  # of text in an answer to it: enough to see that no call is made
_TEXT_TOKENS = 16  # of text in front of a call; more where the task's own examples say more
_CALL_TOKENS = 40  # until it is known that a call is one: its opening, and the function's name
_CHARACTERS = 2  # of a token at least, in most texts
_ROUNDS = 2  # of messages about words of the task
_SHOWN, _MOST = 10, 2000  # answers of a task that are recorded, and characters of a text there


@dataclass(frozen=True)
class _Line:
    """`preamble`: tokens that the task's examples have in front of calls."""

    task: str
    input: dict[str, Any]
    target: str | dict[str, Any]
    metric: str
    preamble: int = 0
    member: Member | None = None  # None: small talk

    @property
    def wants_no_call(self) -> bool:
        return is_free(self.input) and not calls(self.target)

    def tokens(self, characters: float) -> int:
        """About those of an answer that is as long as the right one, of so many characters each."""
        return _TALK_TOKENS if self.member is None else int(len(self.member.example.target) / characters) + 1

    def as_json(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"input": self.input, "target": self.target}
        said = max(_TALK_TOKENS if self.member is None else _TEXT_TOKENS, self.preamble)
        if calls(self.target):
            tree["enough"] = {"text": said}
        elif self.metric not in ("exact", "json"):  # whether a call is made is all that counts
            tree |= {"max_tokens": said + _CALL_TOKENS, "enough": {"text": said, "call": True}}
        return tree


@dataclass
class GateAnswers:
    """What is asked, and what was answered: by line, `before` and `after`."""

    file: Path
    lines: list[_Line]
    metric: dict[str, str]
    before: dict[int, Answered] = field(default_factory=dict)
    after: dict[int, Answered] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Dataset, file: Path, seed: int) -> "GateAnswers":
        """`seed` says which are asked first, as time may be short."""
        holdout, metric = data.of("holdout"), data.metrics
        lines: list[_Line] = []
        talk = small_talk.texts(small_talk.JUDGED)
        for name in dict.fromkeys(member.task.name for member in holdout):
            members = [member for member in data.members if member.task.name == name]
            called = [each for member in members if isinstance(each := member.target, dict) and calls(each)]
            preamble = max((len(each.get("content") or "") // _CHARACTERS for each in called), default=0)
            mine = [
                _Line(name, member.example.input, member.target, metric[name], preamble, member)
                for member in members
                if member.role == "holdout" and member.answered and not member.choices
            ]
            random.Random(seed).shuffle(mine)
            quiet = [line for line in mine if line.wants_no_call]
            lines += mine if metric[name] in metrics.GENERATED else quiet
            if mine and (called or len(quiet) < _FEW):
                asked = small_talk.inputs(talk, members, part=0, rounds=_ROUNDS)
                random.Random(seed).shuffle(asked)
                lines += [_Line(name, input, "", "call", preamble) for input in asked]
        return cls(file, lines, metric)

    async def ask(self, engine: Supervisor, *, candidate: bool, seconds: float, report: Callable[[int], None]) -> float:
        """Has them answered with the weights in use, for at most `seconds`; a candidate only what was answered
        before. Returns the seconds that it took."""
        if not candidate:
            self.file.write_text(
                "".join(json.dumps(line.as_json(), ensure_ascii=False) + "\n" for line in self.lines), "utf-8"
            )
        answers = self.after if candidate else self.before
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, line in enumerate(self.lines):
            if not candidate or number in self.before:
                groups.setdefault((line.task, line.member is None), []).append(number)
        left, begun = seconds, time.monotonic()
        for i, numbers in enumerate(groups.values()):
            done, started = len(answers), time.monotonic()
            share = max(0.0, left) / (len(groups) - i)
            replies = await engine.call(Answer(self.file, numbers, share), lambda n, done=done: report(done + n))  # type: ignore[misc]
            answers |= {number: answer for number, answer in zip(numbers, replies, strict=True) if answer is not None}
            left -= min(share, time.monotonic() - started)
        return min(seconds, time.monotonic() - begun)

    def judged(
        self, outcomes: Mapping[str, Outcome], holdout: Sequence[Member], *, candidate: bool
    ) -> dict[str, Outcome]:
        """The outcomes with hits, and shares of what is right, where both have answered."""
        shares: dict[int, float] = {}
        for number, said in (self.after if candidate else self.before).items():
            line = self.lines[number]
            metric = self.metric[line.task]
            if line.member is not None and metric in metrics.GENERATED and self._both(number):
                shares[line.member.number] = metrics.share_right(metric, said.text, said.calls, line.target)
        asked = {line.member.number for line in self.lines if line.member is not None}
        by_task = {}
        for name, outcome in outcomes.items():
            mine = [member for member in holdout if member.task.name == name]
            generated = self.metric[name] in metrics.GENERATED
            if generated and not any(member.number in asked for member in mine):
                # All were compared or judged: no answer is right or wrong.
                by_task[name] = replace(outcome, metric="loss")
                continue
            by_task[name] = replace(outcome, metric=self.metric[name])
            if generated:
                right = [shares.get(member.number) for member in mine]
                hits: list[bool | None] = list(outcome.hits or [None] * len(mine))
                for i, (member, share) in enumerate(zip(mine, right, strict=True)):
                    if member.number in asked:  # the others, preferences say, have hits of their own
                        hits[i] = None if share is None else share == 1.0
                by_task[name] = replace(by_task[name], hits=hits, shares=right)
        return by_task

    def no_calls(self) -> dict[str, NoCall]:
        """By task, whether calls were made where none is wanted."""
        ours = {*small_talk.texts(small_talk.JUDGED)}
        by_task: dict[str, NoCall] = {}
        for task in dict.fromkeys(line.task for line in self.lines):
            numbers = [n for n, line in enumerate(self.lines) if line.task == task and line.wants_no_call]
            numbers = [n for n in numbers if self._both(n)]
            if numbers:
                sources = {"holdout" if self.lines[n].member else "small talk" for n in numbers}
                before, after = ([bool(said[n].calls) for n in numbers] for said in (self.before, self.after))
                called = [last_said(self.lines[n].input) for n in numbers if self.after[n].calls]
                named = [text for text in called if text in ours][:_SHOWN]
                by_task[task] = NoCall(" and ".join(sorted(sources)), before, after, named)
        return by_task

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Some answers of every task, for people: of those that changed, and of those that did not, in turn."""
        samples: dict[str, list[dict[str, Any]]] = {}
        for task in dict.fromkeys(line.task for line in self.lines):  # others may have no holdout that can be used
            metric = self.metric[task]
            if metric not in metrics.GENERATED:
                continue
            kinds: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
            for number, line in enumerate(self.lines):
                if line.task == task and line.member is not None and self._both(number):
                    entry = _entry(line, line.member, metric, self.before[number], self.after[number])
                    kinds.setdefault((entry["before_right"], entry["after_right"]), []).append(entry)
            ordered = sorted(kinds, key=lambda kind: kind[0] == kind[1])
            samples[task] = _in_turn([kinds[kind] for kind in ordered])[:_SHOWN]
        return samples

    def _both(self, number: int) -> bool:
        return number in self.before and number in self.after


def _entry(line: _Line, member: Member, metric: str, before: Answered, after: Answered) -> dict[str, Any]:
    def right(said: Answered) -> bool:
        return metrics.share_right(metric, said.text, said.calls, line.target) == 1.0

    target: dict[str, Any] = line.target if isinstance(line.target, dict) else {"content": line.target}
    return {
        "example": member.example.id,
        "input": last_said(line.input)[:_MOST],
        "right": _written(str(target.get("content") or ""), target.get("tool_calls") or ()),
        "before": _answered(before),
        "after": _answered(after),
        "before_right": right(before),
        "after_right": right(after),
    }


def _answered(said: Answered) -> str:
    if said.error:
        return f"({said.error})"[:_MOST]
    return _written(said.text, said.calls) + ("" if said.whole else " …")


def _written(text: str, calls: Iterable[Mapping[str, Any]]) -> str:
    parts = [text] if text else []
    parts += [f"{call['function']['name']}({call['function']['arguments']})" for call in calls]
    return "\n".join(parts)[:_MOST]


def _in_turn(lists: Sequence[list[Any]]) -> list[Any]:
    return [each[i] for i in range(max(map(len, lists), default=0)) for each in lists if i < len(each)]
