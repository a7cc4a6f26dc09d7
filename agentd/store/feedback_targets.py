"""What a piece of feedback teaches: the answer that should have been given, where feedback of its kind says so, or how
good the one was that was given.

Where the task's choices leave no doubt, a thumb is worth a label: up confirms the answer, down on one of two choices
means the other; the chosen text of a preference is the label it names. Where answers are free text or calls of tools, a
preference is learned as the pair that it is, and a thumb or a score with the answer that it is about.
"""

import json
from dataclasses import dataclass
from typing import Any

from agentd.errors import InvalidRequest
from agentd.learn.labels import normal_label
from agentd.store.demonstrations import MESSAGE, as_answer, checked_message, message_target
from agentd.store.inferences import STREAMING, Inference
from agentd.store.normalise import normal_text, same_label
from agentd.store.row import to_json
from agentd.store.tasks import PREFERENCE, SCORE, THUMB, Task

KINDS = ("label", "demonstration", "boolean", "preference", "float")
"""Kinds of feedback that may teach; whether a piece does is `feedback_target`'s to say."""
_AROUND = " \t\r\n.,;:!?\"'`*"  # what models put around the word that was asked for

_WHOLE = ("stop", "tool_calls")  # how answers end that are not cut off

Answer = str | dict[str, Any]
"""A text, or an assistant's message that calls tools."""


@dataclass(frozen=True)
class FeedbackTarget:
    """The example that comes of it: its `kind` and `target`, as `store.examples.Example` has them."""

    kind: str
    target: str


def answer_of(inference: Inference) -> Answer | None:
    """What was answered; None while no one knows all of it, and for calls that the request's tools do not allow."""
    if inference.finish_reason == STREAMING:
        return None
    if not inference.tool_calls:
        return inference.output
    message = {"role": "assistant", "content": inference.output, "tool_calls": inference.tool_calls}
    try:
        return as_answer(checked_message(message, inference.input))
    except InvalidRequest:
        return None


def target_on(inference: Inference | None, kind: str, value: Any, task: Task | None) -> FeedbackTarget | None:
    """`feedback_target` of feedback on this inference."""
    if inference is None:
        return feedback_target(kind, value, None, task)
    target = feedback_target(kind, value, answer_of(inference), task)
    if target is None or target.kind not in (PREFERENCE, THUMB, SCORE):
        return target
    cut_off = target.kind != PREFERENCE and inference.finish_reason not in _WHOLE
    return None if cut_off or inference.kind == "classification" else target


def feedback_target(kind: str, value: Any, answer: Answer | None, task: Task | None) -> FeedbackTarget | None:
    """Of feedback of this kind and value (as stored) on an answer; None where it says nothing to learn."""
    if kind == "demonstration":
        if isinstance(value, dict):
            if value.get("tool_calls"):
                return FeedbackTarget(MESSAGE, message_target(value))
            return FeedbackTarget(kind, value["content"])
        return FeedbackTarget(kind, value)
    if kind == "label":
        return FeedbackTarget(kind, same_label(value, task.choices if task else []) or normal_label(value))
    if task is not None and (task.choices or task.open):
        return _among_choices(kind, value, answer, task)
    if kind == "preference":
        chosen, rejected = value["chosen"], value["rejected"]
        if rejected:
            return FeedbackTarget(PREFERENCE, to_json({"chosen": chosen, "rejected": rejected}))
        return (
            FeedbackTarget(MESSAGE, to_json(chosen))
            if isinstance(chosen, dict)
            else FeedbackTarget("demonstration", chosen)
        )
    if kind == "boolean" and answer:
        return FeedbackTarget(THUMB, to_json({"answer": answer, "good": value}))
    if kind == "float" and answer:
        return FeedbackTarget(SCORE, to_json({"answer": answer, "score": value}))
    return None


def says_less(new: FeedbackTarget, known: FeedbackTarget) -> bool:
    """Whether what is known about an input is better than a thumb or a score for an answer to it: the right answer, a
    good one, or one of no lower score."""
    if new.kind not in (THUMB, SCORE):
        return False
    said = json.loads(new.target)
    if known.kind not in (THUMB, SCORE):
        return said.get("good") is not False or said["answer"] != _right_answer(known)
    old = json.loads(known.target)
    if said["answer"] == old["answer"] or new.kind != known.kind:
        return False
    return bool(old["good"] and not said["good"]) if new.kind == THUMB else bool(old["score"] >= said["score"])


def _right_answer(known: FeedbackTarget) -> Answer:
    if known.kind == PREFERENCE:
        chosen: Answer = json.loads(known.target)["chosen"]
        return chosen
    message: dict[str, Any] = json.loads(known.target) if known.kind == MESSAGE else {}
    return message or known.target


def _among_choices(kind: str, value: Any, answer: Answer | None, task: Task) -> FeedbackTarget | None:
    if kind == "boolean":
        said = choice_of(answer, task)
        return _label(said if value or said is None else _other(said, task))
    if kind == "preference":
        return _label(choice_of(value["chosen"], task))
    return None


def _label(choice: str | None) -> FeedbackTarget | None:
    return None if choice is None else FeedbackTarget("label", choice)


def _other(said: str, task: Task) -> str | None:
    """The choice that is left; None where there are several, or may be."""
    others = [choice for choice in task.choices if choice != said]
    return others[0] if len(others) == 1 and not task.open else None


def choice_of(answer: Answer | None, task: Task) -> str | None:
    """The choice that a text names: as it stands, or else the only one that it is but for case and punctuation."""
    if not isinstance(answer, str):
        return None
    if (choice := same_label(answer, task.choices)) is not None:
        return choice
    alike = [choice for choice in task.choices if _plain(choice) == _plain(answer)]
    return alike[0] if len(alike) == 1 else None


def _plain(text: str) -> str:
    return normal_text(text).strip(_AROUND)
