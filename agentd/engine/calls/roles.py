"""Conversations as a chat template takes them: what it refuses, or loses without a word, is said where it is shown.

Templates differ in which roles they know, and in what order. None says so: short conversations are rendered, and what
was said in them is looked for.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from agentd.engine.chat_template import ChatTemplate, TemplateRefusal

Messages = list[dict[str, Any]]

_TURNS = ("user", "assistant", "user")
_TWICE = ("user", "user", "assistant", "assistant", "user")
_HEAD = ("system", "user", "assistant", "user")
_ANYWHERE = ("system", "system", "user", "assistant", "system", "user")


class Roles:
    """What one template makes of roles."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def fitted(self, messages: Sequence[dict[str, Any]]) -> Iterator[Messages]:
        """The messages as the template shows all of them, as far as that could be read off. Where it refuses these all
        the same: users and assistants alone, in turns; then with a turn of the assistant's behind results, too."""
        messages = _results_first(messages)
        plainest = _in_turns(_folded(messages, 0))
        if self._shows_system or any(message["role"] != "system" for message in messages):
            folded = list(messages) if self._limit is None else _folded(messages, self._limit)
            yield _in_turns(folded) if self._takes_turns else folded
        yield plainest
        yield _answered(plainest)

    @cached_property
    def _shows_system(self) -> bool:
        """Whether a system message is shown that no one goes on from."""
        return self._shows(("system",))

    @cached_property
    def _limit(self) -> int | None:
        """How many system messages are shown: none, one at the beginning, or any number anywhere (None). One that
        stands with what the user says last and is gone once that was answered (Mistral Nemo) is not shown: what was
        learned would follow upon another prompt than what was asked, and nothing of it would be cached."""
        if self._shows(_ANYWHERE) or not self._shows(_TURNS):
            return None
        return int(self._shows(_HEAD) and self._shows(_HEAD[:-1]))

    @cached_property
    def _takes_turns(self) -> bool:
        """Whether no one may speak twice in a row."""
        return self._shows(_TURNS) and not self._shows(_TWICE)

    def _shows(self, roles: Sequence[str]) -> bool:
        """Whether everything is laid out that these say."""
        messages = [{"role": role, "content": f"SAIDBY{number}X"} for number, role in enumerate(roles)]
        try:
            text = self._template.render(messages, generate=roles[-1] != "assistant")
        except TemplateRefusal:
            return False
        return all(message["content"] in text for message in messages)


def _results_first(messages: Sequence[dict[str, Any]]) -> Messages:
    """With results right behind their calls: what the system says between them comes after."""
    ordered: Messages = []
    waiting: Messages = []
    for message in messages:
        if message["role"] == "system" and ordered and of_calls(ordered[-1]):
            waiting.append(message)
            continue
        if message["role"] != "tool":
            ordered += waiting
            waiting = []
        ordered.append(message)
    return ordered + waiting


def of_calls(message: dict[str, Any]) -> bool:
    """Whether it calls tools, or is what one returned."""
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _answered(messages: Sequence[dict[str, Any]]) -> Messages:
    """With a blank for an answer where the user goes on from results: for templates that count on one, not empty."""
    answered: Messages = []
    for message in messages:
        if message["role"] == "user" and answered and answered[-1]["role"] == "tool":
            answered.append({"role": "assistant", "content": " "})
        answered.append(message)
    return answered


def _folded(messages: Sequence[dict[str, Any]], limit: int) -> Messages:
    """At most `limit` system messages, at the beginning. What others say stands in front of what the user says next, or
    is the user's own message where someone else goes on: a conversation that grows keeps its beginning."""
    head = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    texts = [str(message["content"]) for message in head]
    folded: Messages = [{**head[0], "content": "\n\n".join(texts)}] if head and limit else []
    waiting = [] if limit else texts
    for message in messages[len(head) :]:
        if message["role"] == "system":
            waiting.append(str(message["content"]))
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": "\n\n".join([*waiting, str(message["content"])])}
            waiting = []
        elif waiting:
            folded.append({"role": "user", "content": "\n\n".join(waiting)})
            waiting = []
        folded.append(message)
    return [*folded, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else folded


def _in_turns(messages: Sequence[dict[str, Any]]) -> Messages:
    """What a user or an assistant says in several messages is one of them; behind calls there are results."""
    turns: Messages = []
    for message in messages:
        before = turns[-1] if turns else {"role": ""}
        same = message["role"] in ("user", "assistant") and before["role"] == message["role"]
        if same and not before.get("tool_calls"):
            texts = [str(each["content"]) for each in (before, message) if each["content"]]
            turns[-1] = {**before, **message, "content": "\n".join(texts)}
        else:
            turns.append(message)
    return turns
