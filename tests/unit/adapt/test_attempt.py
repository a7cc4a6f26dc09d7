"""What every pass does, whatever learns."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentd.adapt.gate.gate import Verdict
from agentd.adapt.gate.skills import Baseline
from agentd.adapt.passes.base import Attempt, Means, Rejected
from agentd.adapt.passes.progress import Progress
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.errors import PassFailed
from agentd.store import examples, passes, revisions, tasks, transitions
from agentd.store.database import Store
from agentd.store.examples import NewExample
from tests.support.store_samples import revision


class Engine:
    revision = 0

    async def call(self, operation: Any, report: Any = None) -> None:
        pass


class Nothing(Attempt):
    """Learns nothing, which the gate notices, unless it is told not to."""

    accepted = False

    async def _encode(self, data: Dataset) -> Dataset:
        return data

    async def _learn(self, data: Dataset) -> None:
        pass

    async def _gate(self, data: Dataset) -> Verdict:
        await self._advance("gated")
        return Verdict(self.accepted, "no")

    async def _stage_candidate(self) -> None:
        pass

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        raise PassFailed("the disk is full")


class Accepted(Nothing):
    accepted = True


@contextmanager
def planned(tmp_path: Path) -> Iterator[tuple[Store, Any, Dataset]]:
    """A pass that has read two examples, `first` both; the second is corrected before it begins. A third one's weight
    was drawn against it."""

    def give(n: int, target: str) -> None:
        store.do(examples.add, NewExample("t", "demonstration", {"prompt": f"text {n}"}, target))

    with closing(Store(tmp_path / "agentd.db")) as store:
        for n in range(2):
            give(n, "first")
        number = store.do(passes.create, "manual", 0, 0, {}).id
        read = store.do(examples.list_, 10)
        give(2, "undrawn")
        undrawn = [example.id for example in store.do(examples.list_, 10) if example.target == "undrawn"]
        store.do(lambda db: db.execute("UPDATE examples SET updated_at = ?", [read[0].updated_at]))
        task = store.do(tasks.get, "t")
        time.sleep(0.01)
        give(1, "second")
        for state in ("planned", "tapped"):
            store.do(passes.advance, number, state)
        means: Any = SimpleNamespace(
            config=None,
            store=store,
            engine=Engine(),
            files=None,
            progress=Progress(number),
            folder=tmp_path,
            seed=0,
            baseline=Baseline(),
            relearn=False,
            parked=None,
        )
        assert set(means.__dict__) == set(Means.__dataclass_fields__)
        data = Dataset([Member(i, example, "train", task) for i, example in enumerate(read)], {}, undrawn=undrawn)
        yield store, means, data


def states(store: Store) -> dict[str, str]:
    return {example.target: example.state for example in store.do(examples.list_, 10)}


def test_what_is_corrected_while_a_pass_is_planned_stays_new(tmp_path: Path) -> None:
    with planned(tmp_path) as (store, means, data):
        with pytest.raises(Rejected):
            asyncio.run(Nothing(means).run(data))
        assert states(store) == {"first": "used", "second": "new", "undrawn": "used"}
        assert store.do(passes.get, means.progress.id).state == "rejected"


def test_a_pass_that_fails_before_its_trial_has_spent_no_example(tmp_path: Path) -> None:
    with planned(tmp_path) as (store, means, data):
        attempt = Accepted(means)
        with pytest.raises(PassFailed):
            asyncio.run(attempt.run(data))
        assert states(store) == {"first": "new", "second": "new", "undrawn": "new"}
        number = means.progress.id
        store.do(passes.advance, number, "staged", revision=1)
        store.do(revisions.add, revision(1, 0, number, state="staged"))
        store.do(transitions.begin_trial, 1, number, 3, attempt.learned)
        assert states(store) == {"first": "used", "second": "new", "undrawn": "used"}
