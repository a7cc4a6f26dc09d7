"""Holdout answered as it is served: by what serves and by the candidate, within the time that the gate has for it.

Tasks with a generated metric have their holdout answered. Where tools are declared and none has to be called, messages
that want no call are answered besides: those of the holdout, or where it has few the project's own small talk, with
the task's tools.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from agentd.adapt.gate import metrics
from agentd.adapt.gate.gate import NoCall, Outcome
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.engine.operations import Answer, Answered
from agentd.engine.process.supervisor import Supervisor
from agentd.store.normalise import content_text

_FEW = 10  # messages of a task's own that want no call, below which small talk is asked instead
_TALK_TOKENS = 48  # of an answer to it: enough to see whether a call is made
_SHOWN, _MOST = 10, 2000  # answers of a task that are recorded, and characters of a text there


@dataclass(frozen=True)
class _Line:
    task: str
    input: dict[str, Any]
    target: str | dict[str, Any]
    member: Member | None = None  # None: small talk

    @property
    def wants_no_call(self) -> bool:
        return _auto_tools(self.input) and not _calls(self.target)

    def as_json(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"input": self.input, "target": self.target}
        return tree if self.member is not None else {**tree, "max_tokens": _TALK_TOKENS}


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
        for name in dict.fromkeys(member.task.name for member in holdout):
            mine = [
                _Line(name, member.example.input, member.target, member)
                for member in holdout
                if member.task.name == name and member.answered and not member.choices
            ]
            random.Random(seed).shuffle(mine)
            quiet = [line for line in mine if line.wants_no_call]
            lines += mine if metric[name] in metrics.GENERATED else quiet
            if len(quiet) < _FEW and (model := next((line for line in mine if _auto_tools(line.input)), None)):
                lines += [_Line(name, _talk(model.input, text), "") for text in small_talk()]
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
        by_task: dict[str, NoCall] = {}
        for own in (True, False):  # where a task has few of its own, small talk has the last word
            for task in dict.fromkeys(line.task for line in self.lines):
                lines = enumerate(self.lines)
                mine = [n for n, line in lines if line.task == task and (line.member is not None) == own]
                numbers = [n for n in mine if self.lines[n].wants_no_call and self._both(n)]
                if numbers:
                    calls = [[bool(said[n].calls) for n in numbers] for said in (self.before, self.after)]
                    by_task[task] = NoCall("holdout" if own else "small talk", *calls)
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


def small_talk() -> list[str]:
    """Messages that want no call, with any tools."""
    return (resources.files("agentd.adapt.gate") / "small_talk.txt").read_text("utf-8").strip().split("\n")


def _entry(line: _Line, member: Member, metric: str, before: Answered, after: Answered) -> dict[str, Any]:
    def right(said: Answered) -> bool:
        return metrics.share_right(metric, said.text, said.calls, line.target) == 1.0

    target: dict[str, Any] = line.target if isinstance(line.target, dict) else {"content": line.target}
    return {
        "example": member.example.id,
        "input": _last_said(line.input)[:_MOST],
        "right": _written(str(target.get("content") or ""), target.get("tool_calls") or ()),
        "before": _written(before.text, before.calls, before.error),
        "after": _written(after.text, after.calls, after.error),
        "before_right": right(before),
        "after_right": right(after),
    }


def _written(text: str, calls: Iterable[Mapping[str, Any]], error: str | None = None) -> str:
    parts = [text] if text else []
    parts += [f"{call['function']['name']}({call['function']['arguments']})" for call in calls]
    return (f"({error})" if error else "\n".join(parts))[:_MOST]


def _last_said(input: Mapping[str, Any]) -> str:
    said = [message for message in input.get("messages") or () if message.get("role") == "user"]
    return content_text(said[-1].get("content")) if said else str(input.get("prompt", ""))


def _in_turn(lists: Sequence[list[Any]]) -> list[Any]:
    return [each[i] for i in range(max(map(len, lists), default=0)) for each in lists if i < len(each)]


def _auto_tools(input: Mapping[str, Any]) -> bool:
    """Whether it is the model's choice to call."""
    return bool(input.get("tools")) and input.get("tool_choice", "auto") == "auto"


def _calls(target: str | Mapping[str, Any]) -> bool:
    return not isinstance(target, str) and bool(target.get("tool_calls"))


def _talk(input: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Small talk as the first message behind the system's, with the same tools."""
    begun = [message for message in input["messages"][:1] if message["role"] == "system"]
    fields = {name: value for name, value in input.items() if name != "response_format"}
    return {**fields, "messages": [*begun, {"role": "user", "content": text}]}
