"""What every pass does, whatever learns."""

import asyncio
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentd.adapt.gate.gate import Verdict
from agentd.adapt.passes.base import Attempt, Means, Rejected
from agentd.adapt.passes.progress import Progress
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.store import examples, passes, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample


class Engine:
    revision = 0

    async def call(self, operation: Any, report: Any = None) -> None:
        pass


class Nothing(Attempt):
    """Learns nothing, which the gate notices."""

    async def _encode(self, data: Dataset) -> Dataset:
        return data

    async def _learn(self, data: Dataset) -> None:
        pass

    async def _gate(self, data: Dataset) -> Verdict:
        await self._advance("gated")
        return Verdict(False, "no")

    async def _stage_candidate(self) -> None:
        pass

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        return {}, {}


def test_what_is_corrected_while_a_pass_is_planned_stays_new(tmp_path: Path) -> None:
    def give(n: int, target: str) -> None:
        store.do(examples.add, NewExample("t", "demonstration", {"prompt": f"text {n}"}, target))

    with closing(Store(tmp_path / "agentd.db")) as store:
        for n in range(2):
            give(n, "first")
        number = store.do(passes.create, "manual", 0, 0, {}).id
        read = store.do(examples.list_, 10)
        task = store.do(tasks.get, "t")
        time.sleep(0.01)
        give(1, "second")
        for state in ("planned", "tapped"):
            store.do(passes.advance, number, state)
        means: Any = SimpleNamespace(
            config=None, store=store, engine=Engine(), files=None, progress=Progress(number), folder=tmp_path, seed=0
        )
        assert set(means.__dict__) == set(Means.__dataclass_fields__)
        data = Dataset([Member(i, example, "train", task) for i, example in enumerate(read)], {})
        with pytest.raises(Rejected):
            asyncio.run(Nothing(means).run(data))
        states = {example.target: example.state for example in store.do(examples.list_, 10)}
    assert states == {"first": "used", "second": "new"}
