"""What several benchmarks start from: an engine of their own, and examples as a pass has them."""

from pathlib import Path
from typing import Any

from agentd.adapt.planning.dataset import Member
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.store.examples import Example
from agentd.store.tasks import Task

THREADS = 2


def supervisor(model: Path, activity: Activity, context: int = 4096) -> Supervisor:
    """An engine in a process of its own on the base weights, not started yet."""
    settings = {"engine": "llamacpp", "path": str(model), "context": context, "slots": 4}
    return Supervisor(
        {**settings, "threads": THREADS, "gpu_layers": "auto"},
        lambda _: (None, None),
        activity,
        revision=0,
        queue_limit=8,
        fallback=_no_fallback,
    )


def member(number: int, role: str, task: str, answers: list[str], input: dict[str, Any], target: str) -> Member:
    """An example in a pass's dataset. `answers` is empty for free text."""
    kind = "label" if answers else "demonstration"
    example = Example(str(number), task, kind, input, target, "train", "new", None, "", "", "")
    metric = "accuracy" if answers else "loss"
    return Member(number, example, role, Task(task, answers, False, metric, None, "config", ""))


async def _no_fallback(error: Exception, revision: int) -> int:
    raise error
