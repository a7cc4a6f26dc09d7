"""What takes a revision back while it serves on trial: feedback, slowness. The clock is the only thing made up."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from agentd.adapt.trial.feedback_monitor import Rate, more_negative, rate
from agentd.adapt.trial.trial import TrialWatch
from agentd.config.schema import TrialSettings
from agentd.engine.protocol import Generate, Piece
from agentd.store import feedback, inferences
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from agentd.store.inferences import Inference
from tests.support.store_samples import recorded


def record(db: Database, n: int, revision: int, kind: str, value: object, output: str = "yes") -> None:
    id = f"{revision}-{n}-{kind}"
    inferences.record(
        db, Inference(id, "", revision, "chat", None, {"prompt": id}, output, {}, "stop", 1, 1, None, 1.0)
    )
    feedback.add(db, NewFeedback(id, kind, value, task="t"))


def test_what_counts_as_negative(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "agentd.db")) as store:
        good = [("boolean", True), ("float", 0.9), ("label", "yes"), ("preference", {"chosen": "yes", "rejected": "x"})]
        bad = [("boolean", False), ("float", 0.1), ("label", "no"), ("preference", {"chosen": "no"})]
        for n, (kind, value) in enumerate([*good, *bad, ("demonstration", "no"), ("comment", "hm")]):
            store.do(record, n, 3, kind, value)
        store.do(record, 0, 4, "boolean", True)
        assert store.do(rate, 3) == Rate(5, 9)
        assert store.do(rate, 4) == Rate(0, 1)
        assert store.do(rate, 5) == Rate(0, 0)


def test_a_call_that_was_cut_off_is_another_one_than_the_right_one(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "on", "parameters": {}}}]
    cut = {"id": "c", "type": "function", "function": {"name": "on", "arguments": '{"room": "ha'}}
    right = {"tool_calls": [{"function": {"name": "on", "arguments": '{"room": "hall"}'}}]}
    input = {"messages": [{"role": "user", "content": "on"}], "tools": tools}
    with closing(Store(tmp_path / "agentd.db")) as store:
        id = store.do(recorded, input=input, output="", tool_calls=[cut], finish_reason="length", revision=3)
        store.do(feedback.add, NewFeedback(id, "demonstration", right))
        assert store.do(rate, 3) == Rate(1, 1)


def test_a_revision_that_people_dislike_is_noticed_soon_and_one_like_the_last_is_left_alone() -> None:
    committed = Rate(50, 500)
    assert more_negative(Rate(1, 1), committed, 0.01) is None
    assert more_negative(Rate(0, 100), committed, 0.01) is None
    problem = more_negative(Rate(6, 8), committed, 0.01)
    assert problem is not None
    assert "6 of 8" in problem
    generator, alarms = random.Random(1), 0
    for _ in range(500):
        negative = 0
        for total in range(1, 101):  # looked at after every piece of feedback
            negative += generator.random() < 0.1
            if more_negative(Rate(negative, total), committed, 0.01):
                alarms += 1
                break
    assert alarms <= 15  # expected at most 5, deviation 2.2


class Slow:
    """An engine whose answers take as long as it is told, on a clock of its own."""

    restarts, info = 0, None

    def __init__(self) -> None:
        self.now, self.seconds, self.revision = 0.0, 0.1, 0

    async def generate(self, request: Generate) -> AsyncIterator[Piece]:
        self.now += self.seconds
        yield Piece(request.key, "x", finish="stop", logprobs=[{"logprob": -0.1}])


@pytest.mark.parametrize(("seconds", "slow"), [(0.1, False), (0.25, False), (0.6, True)])
def test_a_revision_that_answers_much_more_slowly_is_taken_back(seconds: float, slow: bool) -> None:
    engine = Slow()

    async def run() -> str | None:
        trial = TrialWatch(engine, TrialSettings(duration=0), clock=lambda: engine.now)  # type: ignore[arg-type]
        await trial.measure()
        engine.seconds = seconds
        return await trial.run()

    problem = asyncio.run(run())
    assert (problem is not None) == slow
    if slow:
        assert "6.0 times as long" in str(problem)


def test_negative_feedback_ends_a_trial() -> None:
    async def object_to_it() -> str | None:
        return "everybody says so"

    async def run() -> str | None:
        engine = Slow()
        return await TrialWatch(engine, TrialSettings(duration=60), object_to_it, lambda: engine.now).run()  # type: ignore[arg-type]

    assert asyncio.run(run()) == "everybody says so"
