"""For which tasks past corrections are put into prompts, and how many: held in memory, so that a request to any other
task costs no look-up."""

from collections.abc import Callable
from typing import Any

from agentd.config.schema import Config
from agentd.errors import Conflict
from agentd.store import events, recall
from agentd.store.database import Store
from agentd.store.recall import Recall

K = 4  # corrections in a prompt where nothing was judged yet


class RecallSwitch:
    """`config` is what holds now."""

    def __init__(self, config: Callable[[], Config], store: Store) -> None:
        self._config, self._store = config, store
        self._rows: dict[str, Recall] = {}
        self.waits: dict[str, str] = {}
        """By task, what its next judgement waits for, where one is due or none was made yet."""

    async def load(self) -> None:
        """Takes in what the store says. Raises StorageFailed."""
        self._rows = await self._store.call(recall.all)

    def setting(self, task: str) -> str:
        """off, on or auto: what the configuration says of the task, or else its owner's command, or else the rule for
        all tasks."""
        config, row = self._config(), self._row(task)
        declared = config.tasks.get(task)
        of_task = declared.recall if declared is not None else None
        return of_task or row.setting or config.adapt.recall

    def k(self, task: str | None, wish: bool | None = None) -> int:
        """How many corrections a request's prompt may get; 0: recall is off. `wish` is what the request says."""
        if task is None or wish is False:
            return 0
        setting, row = self.setting(task), self._row(task)
        on = wish or setting == "on" or (setting == "auto" and row.active)
        return (row.k or K) if on else 0

    async def set(self, task: str, setting: str) -> dict[str, Any]:
        """What the owner commands. Raises NotFound, and Conflict where the configuration says it."""
        declared = self._config().tasks.get(task)
        if declared is not None and declared.recall is not None:
            raise Conflict(f"recall of task {task!r} is set in the configuration; change it there")
        row = await self._store.call(recall.set_, task, setting)
        await self._store.call(events.add, "recall", f"task {task}: set to {setting} by the owner")
        self._rows[task] = row
        return self.as_json(task)

    def note(self, row: Recall) -> None:
        """A judgement that is stored takes effect."""
        self._rows[row.task] = row

    def row(self, task: str) -> Recall:
        """The last judgement of a task."""
        return self._row(task)

    def as_json(self, task: str) -> dict[str, Any]:
        """Of a task, for people: setting, whether it is on, why and with which figures."""
        setting, row = self.setting(task), self._row(task)
        waits = self.waits.get(task) if setting == "auto" else None
        reason = row.reason if setting == "auto" else f"set to {setting}"
        if reason is None and waits is not None:
            reason = f"not judged yet, it waits for {waits}"
        return {
            "setting": setting,
            "on": self.k(task) > 0,
            "k": row.k or (K if self.k(task) else None),
            "reason": reason,
            "waits_for": waits,
            "figures": row.figures,
            "decided_at": row.decided_at,
        }

    def _row(self, task: str) -> Recall:
        return self._rows.get(task) or Recall(task)
