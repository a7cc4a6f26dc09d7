"""Every judged answer is scored as it was served, once, and counted by task, revision and day."""

from dataclasses import replace
from typing import Any

import pytest
from sqlite_utils import Database

from agentd.store import feedback, forgetting, inferences, recovery, scores, tasks
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from agentd.store.forgetting import Selection
from agentd.store.scores import Day
from agentd.store.tasks import Task
from tests.support.store_samples import recorded

CHOICES = ["good", "bad", "so so"]
CALL = {"id": "call_1", "type": "function", "function": {"name": "turn_on", "arguments": '{"lamp": "desk"}'}}
TOOLS = [{"type": "function", "function": {"name": "turn_on", "parameters": {"type": "object"}}}]
TODAY = "2026-01-31"


def task(name: str, choices: list[str] | None = None, metric: str = "auto") -> Task:
    return Task(name, choices or [], False, metric, None, "config", "2026-01-01T00:00:00.000Z")


@pytest.fixture(autouse=True)
def declared(store: Store) -> None:
    for each in (task("films", CHOICES, "accuracy"), task("home"), task("facts", metric="exact"), task("prose")):
        store.do(tasks.declare, each)


def answer(db: Database, /, output: str, **changes: Any) -> str:
    return recorded(db, **{"created_at": f"{TODAY}T23:59:59.000Z", "output": output, **changes})


def say(store: Store, inference: str, kind: str, value: Any, task: str, **more: Any) -> str:
    new = NewFeedback(inference, kind, value, task=task, **{"author": "uid:1", **more})
    return store.do(feedback.add, new)[0].id


def counted(store: Store, task: str) -> list[Day]:
    return store.do(scores.days, task, 100)


@pytest.mark.parametrize(
    ("task", "output", "calls", "kind", "value", "right"),
    [
        ("films", "good", [], "label", "good", True),
        ("films", " Good.", [], "label", "good", True),
        ("films", "good", [], "label", "bad", False),
        ("films", "What film?", [], "label", "bad", False),
        ("films", "good", [], "boolean", True, True),
        ("films", "good", [], "boolean", False, False),
        ("films", "good", [], "preference", {"chosen": "bad"}, False),
        ("home", "", [CALL], "demonstration", {"role": "assistant", "tool_calls": [CALL]}, True),
        ("home", "It is on.", [], "demonstration", {"role": "assistant", "tool_calls": [CALL]}, False),
        ("facts", "Paris ", [], "demonstration", "Paris", True),
        ("facts", "Rome", [], "demonstration", "Paris", False),
        ("prose", "Once upon", [], "boolean", True, True),
        ("prose", "Once upon", [], "demonstration", "Once upon a time", None),
        ("prose", "Once upon", [], "float", 0.1, None),
        ("films", "good", [], "comment", "nice", None),
    ],
)
def test_an_answer_is_right_by_its_tasks_metric(
    store: Store, task: str, output: str, calls: list[Any], kind: str, value: Any, right: bool | None
) -> None:
    input = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS}
    inference = store.do(answer, output, tool_calls=calls, input=input, revision=3)
    say(store, inference, kind, value, task)
    assert counted(store, task) == ([] if right is None else [Day(TODAY, 3, 1, int(right))])


def test_later_feedback_on_the_same_answer_replaces_the_score(store: Store) -> None:
    inference = store.do(answer, "good")
    say(store, inference, "label", "good", "films")
    say(store, inference, "label", "good", "films")  # a duplicate
    assert counted(store, "films") == [Day(TODAY, 0, 1, 1)]
    last = say(store, inference, "label", "bad", "films")
    assert counted(store, "films") == [Day(TODAY, 0, 1, 0)]
    say(store, inference, "comment", "sorry", "films")
    assert counted(store, "films") == [Day(TODAY, 0, 1, 0)]
    store.do(forgetting.forget, Selection(feedback=(last,)))
    assert counted(store, "films") == [Day(TODAY, 0, 1, 1)], "what was said before counts again"


def test_the_same_question_later_is_scored_again(store: Store) -> None:
    """As one that was corrected, learned, and is right now."""
    for revision, output in enumerate(("bad", "bad", "good")):
        inference = store.do(answer, output, revision=revision, created_at=f"2026-02-0{revision + 1}T01:00:00.000Z")
        say(store, inference, "label", "good", "films")
    days = counted(store, "films")
    assert [(day.day, day.revision, day.right) for day in days] == [
        ("2026-02-01", 0, 0),
        ("2026-02-02", 1, 0),
        ("2026-02-03", 2, 1),
    ]


def test_what_is_believed_less_or_nothing_scores_nothing(store: Store) -> None:
    inference = store.do(answer, "good")
    say(store, inference, "label", "good", "films")
    program = NewFeedback(inference, "label", "bad", task="films", source="program", author="uid:2")
    assert store.do(feedback.add, program, {"program": 0.5})[0].state == "outweighed"
    assert counted(store, "films") == [Day(TODAY, 0, 1, 1)]
    other = store.do(answer, "good", input={"prompt": "another"})
    apart = say(store, other, "label", "bad", "films", quarantine="a flood")
    implied = store.do(answer, "good", input={"prompt": "a third"})
    say(store, implied, "boolean", False, "films", source="implicit")
    assert counted(store, "films") == [Day(TODAY, 0, 1, 1)]
    store.do(feedback.release, [apart])
    assert counted(store, "films") == [Day(TODAY, 0, 2, 1)]


def test_an_episodes_outcome_is_no_verdict_on_its_steps(store: Store) -> None:
    inference = store.do(answer, "good", episode="e", task="films")
    store.do(feedback.add, NewFeedback(None, "boolean", False, task="films", episode="e"))
    assert counted(store, "films") == []
    say(store, inference, "label", "good", "films")
    assert counted(store, "films") == [Day(TODAY, 0, 1, 1)]


def test_forgetting_leaves_nothing_of_a_score(store: Store) -> None:
    for n in range(3):
        inference = store.do(answer, "good", author="uid:7", input={"prompt": f"{n}"})
        say(store, inference, "label", CHOICES[n % 2], "films")
    store.do(forgetting.forget, Selection(inferences=(inference,)))
    assert counted(store, "films") == [Day(TODAY, 0, 2, 1)]
    store.do(forgetting.forget, Selection(authors=("uid:7",)))
    left = store.do(lambda db: [db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in TABLES])
    assert left == [0, 0]


TABLES = ("scores", "score_counts")


def test_counters_are_what_counting_gives(store: Store) -> None:
    for n in range(60):
        moment = f"2026-02-{1 + n // 9:02}T00:00:00.000Z"
        inference = store.do(answer, CHOICES[n % 3], created_at=moment, revision=n // 20, input={"prompt": f"{n}"})
        say(store, inference, "label", CHOICES[n % 2], "films")
        if n % 7 == 0:
            say(store, inference, "label", CHOICES[n % 3], "films")
    count = "SELECT day, revision, count(*), sum(correct) FROM scores GROUP BY day, revision ORDER BY day, revision"
    rows = store.do(lambda db: [Day(*row) for row in db.execute(count)])
    assert counted(store, "films") == rows
    assert sum(day.n for day in rows) == 60
    assert store.do(scores.days, "films", 2) == rows[-2:]
    assert store.do(scores.series, 2) == {"films": rows[-2:]}


def test_an_answer_judged_while_it_streams_is_scored_when_it_is_whole(store: Store) -> None:
    inference = store.do(answer, "go", finish_reason="streaming")
    say(store, inference, "label", "good", "films")
    assert counted(store, "films") == []
    begun = store.do(inferences.get, inference)
    for _ in range(2):
        store.do(scores.record, replace(begun, output="good", finish_reason="stop"))
        assert counted(store, "films") == [Day(TODAY, 0, 1, 1)]


def test_an_answer_that_a_crash_cut_off_is_scored_as_far_as_it_came(store: Store) -> None:
    judged = store.do(answer, "so", finish_reason="streaming")
    store.do(answer, "go", finish_reason="streaming", input={"prompt": "another"})
    say(store, judged, "label", "good", "films")
    store.do(recovery.recover)
    assert counted(store, "films") == [Day(TODAY, 0, 1, 0)]
    assert store.do(inferences.get, judged).finish_reason == "cancelled"
