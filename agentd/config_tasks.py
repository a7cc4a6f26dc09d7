"""Tasks as a configuration declares them: the answers they allow, how they are judged, and a prompt."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task declared in the configuration. `choices` empty: answers are free text."""

    choices: tuple[str, ...] = ()
    metric: str = "accuracy"
    prompt: str | None = None


def declared(tree: Any, problems: list[str]) -> dict[str, Task]:
    """The tasks of a configuration's section; what is wrong with them is added to `problems`."""
    if not isinstance(tree, dict):
        problems.append("tasks: must be a mapping of task names")
        return {}
    tasks: dict[str, Task] = {}
    for name, body in tree.items():
        where, body = f"tasks.{name}", body or {}
        if not isinstance(body, dict):
            problems.append(f"{where}: must be a mapping")
            continue
        problems += [
            f"{where}.{key}: unknown key; known here: choices, metric, prompt"
            for key in body
            if key not in Task.__annotations__
        ]
        choices = body.get("choices") or []
        if isinstance(choices, list) and any(isinstance(choice, bool) for choice in choices):
            problems.append(
                f"{where}.choices: YAML reads a bare yes, no, on, off, true or false as a truth value; quote it"
            )
            choices = []
        if (
            not isinstance(choices, list)
            or len({str(c) for c in choices}) != len(choices)
            or len(choices) == 1
            or "" in choices
        ):
            problems.append(f"{where}.choices: must be a list of two or more different texts, or empty")
            choices = []
        metric = body.get("metric", "accuracy" if choices else "loss")
        if metric not in (("accuracy", "loss") if choices else ("loss",)):
            problems.append(f"{where}.metric: {metric!r} is not one of accuracy (needs choices), loss")
            metric = "loss"
        prompt = body.get("prompt")
        if prompt is not None and "{text}" not in str(prompt):
            problems.append(f"{where}.prompt: must contain {{text}}, where the input goes")
        tasks[str(name)] = Task(
            tuple(str(choice) for choice in choices), metric, None if prompt is None else str(prompt)
        )
    return tasks
