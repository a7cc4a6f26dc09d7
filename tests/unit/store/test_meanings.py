"""Examples from before labels changed their meaning are set aside, and come back where they did not."""

import itertools
import random
from dataclasses import replace
from datetime import date, timedelta

import pytest
from sqlite_utils import Database

from agentd import ids
from agentd.errors import InvalidRequest
from agentd.store import events, examples, feedback, meanings, tasks
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from agentd.store.tasks import Task
from tests.support.store_samples import recorded

LABELS = ["bad", "good"]
TASK = Task("mood", LABELS, False, "accuracy", None, "config", "2026-01-01T00:00:00.000Z")


@pytest.fixture
def told(store: Store) -> Store:
    """Ten days of a model that knows what is meant, and two of people who mean the opposite by it."""
    store.do(tasks.declare, TASK)
    store.do(live, -12, [0.9] * 10 + [0.1] * 2)
    return store


def live(db: Database, first: int, shares: list[float]) -> None:
    chance = random.Random(first)
    for number, share in enumerate(shares, first):
        at = (date.today() + timedelta(days=number)).isoformat() + "T12:00:00.000Z"
        for i in range(20):
            given = chance.choice(LABELS)
            meant = given if chance.random() < share else LABELS[given == "bad"]
            id = recorded(db, f"text {number} {i}", task="mood", output=given, created_at=at)
            stored, _ = feedback.add(db, NewFeedback(id, "label", meant))
            db.execute("UPDATE examples SET updated_at = ? WHERE id = ?", [at, stored.example_id])


def states(store: Store) -> dict[str, set[str]]:
    """By state, the days."""
    rows = sorted(store.do(examples.list_, 1000), key=lambda row: row.state)
    return {state: {row.updated_at[:10] for row in of} for state, of in itertools.groupby(rows, lambda row: row.state)}


def days(first: int, end: int) -> set[str]:
    return {(date.today() + timedelta(days=number)).isoformat() for number in range(first, end)}


def said(store: Store) -> list[str]:
    kinds = (meanings.CHANGED, meanings.TAKEN_BACK)
    return [event.message for event in store.do(events.latest, 100) if event.kind in kinds]


def test_examples_from_before_a_change_are_set_aside_once(told: Store) -> None:
    told.do(meanings.review)
    day = (date.today() - timedelta(days=2)).isoformat()
    assert states(told) == {"new": days(-2, 0), "stale": days(-12, -2)}
    (message,) = said(told)
    assert message.startswith(f'task mood: since {day} "bad" and "good" mean something else; ')
    assert told.do(tasks.get, "mood").meaning == {"since": dict.fromkeys(LABELS, day), "settled": day}
    told.do(meanings.review)
    assert len(said(told)) == 1


def test_they_stay_aside_when_the_task_is_declared_again(told: Store) -> None:
    told.do(meanings.review)
    before = states(told)
    told.do(tasks.declare, TASK)  # as at every start of the daemon
    assert states(told) == before
    told.do(tasks.declare, Task("mood", ["bad", "fine"], False, "accuracy", None, "config", ids.now()))
    told.do(tasks.declare, TASK)
    assert states(told) == before


def test_a_correction_of_the_same_input_counts(told: Store) -> None:
    told.do(meanings.review)
    old = next(row for row in told.do(examples.list_, 1000, 0, "mood", None, "stale"))
    assert old.source_inference_id is not None
    told.do(feedback.add, NewFeedback(old.source_inference_id, "label", LABELS[old.target == "bad"]))
    assert old.id not in {row.id for row in told.do(examples.list_, 1000, 0, "mood", None, "stale")}


def test_the_owner_knows_better(told: Store) -> None:
    told.do(meanings.review)
    task, n = told.do(meanings.take_back, told.do(tasks.get, "mood"))
    assert (n, states(told), len(said(told))) == (200, {"new": days(-12, 0)}, 2)
    assert task.meaning == {"since": {}, "settled": date.today().isoformat()}
    told.do(meanings.review)  # and is not contradicted by what was said until then
    assert len(said(told)) == 2
    _, n = told.do(meanings.change, task, ["good"], (date.today() - timedelta(days=5)).isoformat())
    rows = told.do(examples.list_, 1000, 0, "mood", None, "stale")
    assert n == len(rows) > 0
    assert {row.target for row in rows} == {"good"}
    with pytest.raises(InvalidRequest, match="no choice 'neutral'"):
        told.do(meanings.change, task, ["neutral"], "2026-01-01")


def test_thumbs_say_it_too_and_answers_that_no_one_judges_speak_against_it(store: Store) -> None:
    def live_with_thumbs(db: Database, task: str) -> None:
        for number, share in enumerate([0.9] * 10 + [0.1] * 2, -12):
            at = (date.today() + timedelta(days=number)).isoformat() + "T12:00:00.000Z"
            chance = random.Random(number)
            for i in range(20):
                id = recorded(db, f"{number} {i}", task=task, output=chance.choice(LABELS), created_at=at)
                feedback.add(db, NewFeedback(id, "boolean", chance.random() < share))

    def be_silent(db: Database) -> None:
        for day in (-2, -1):
            at = (date.today() + timedelta(days=day)).isoformat() + "T13:00:00.000Z"
            for i in range(300):
                recorded(db, f"more {day} {i}", task="mood", output="bad", created_at=at)

    for task in (TASK, replace(TASK, name="tone")):
        store.do(tasks.declare, task)
        store.do(live_with_thumbs, task.name)
    store.do(be_silent)
    store.do(meanings.review)
    (message,) = said(store)
    assert message.startswith("task tone: ")


def test_another_day_takes_the_place_of_the_one_before(told: Store) -> None:
    def since(days_ago: int) -> None:
        day = (date.today() - timedelta(days=days_ago)).isoformat()
        told.do(lambda db: meanings.change(db, tasks.get(db, "mood"), LABELS, day))

    since(2)
    since(7)
    assert states(told) == {"new": days(-7, 0), "stale": days(-12, -7)}
    since(4)
    assert states(told) == {"new": days(-4, 0), "stale": days(-12, -4)}


def test_they_stay_aside_when_a_label_gets_another_name(told: Store) -> None:
    told.do(lambda db: tasks.update(db, tasks.get(db, "mood"), source="feedback"))  # else the configuration is edited
    told.do(meanings.review)
    aside = states(told)["stale"]
    told.do(tasks.edit, "mood", {"bad": "Bad", "good": "fine"}, [])
    assert states(told)["stale"] == aside
    told.do(tasks.declare, replace(TASK, choices=["Bad", "fine"]))
    assert states(told)["stale"] == aside
    task, n = told.do(lambda db: meanings.take_back(db, tasks.get(db, "mood")))
    assert (task.meaning["since"], set(states(told)), n) == ({}, {"new"}, 200)
