import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from agentd import ids
from agentd.errors import InvalidLine, LabelNotInChoices
from agentd.store import examples, imports, tasks
from agentd.store.database import Store
from agentd.store.examples import Example, NewExample
from agentd.store.tasks import Task


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "agentd.db")) as opened:
        opened.do(tasks.declare, Task("sentiment", ["good", "bad"], False, "accuracy", None, "config", ids.now()))
        yield opened


def new(n: int, target: str = "good", task: str = "sentiment", kind: str = "label") -> NewExample:
    return NewExample(task, kind, {"messages": [{"role": "user", "content": f"film {n}"}]}, target)


def fill(store: Store, n: int) -> list[Example]:
    store.do(imports.add_many, [new(i) for i in range(n)])
    return store.do(examples.list_, n)


def of_split(split: str, n: int) -> list[NewExample]:
    found = [new(i) for i in range(20 * n) if examples.split_of(examples.identify("sentiment", new(i).input)) == split]
    return found[:n]


def test_the_split_is_a_function_of_task_and_input_alone() -> None:
    # Frozen: if these change, holdout examples of existing installations become training data.
    first = {"messages": [{"role": "user", "content": "film 0"}]}
    assert examples.identify("sentiment", first) == "c6b9004c6f956b1cfe91200e5de71ba7"
    assert examples.identify("other", first) != examples.identify("sentiment", first)
    assert [examples.split_of(f"{n:08x}" + "0" * 24) for n in (0, 1, 4, 5)] == ["holdout", "train", "train", "holdout"]
    assert examples.identify("t", {"a": 1, "b": 2}) == examples.identify("t", {"b": 2, "a": 1})


def test_one_fifth_is_held_out(store: Store) -> None:
    fill(store, 1000)
    count = store.do(examples.count)["sentiment"]
    assert 150 < count["holdout"] < 250
    assert count["train"] == {"new": 1000 - count["holdout"], "used": 0}
    assert store.do(examples.count_new) == count["train"]["new"]


def test_a_later_label_replaces_the_target_and_nothing_else(store: Store) -> None:
    first = store.do(examples.add, new(1, "good"))
    store.do(examples.mark_used, [first.id])
    assert store.do(examples.add, new(1, "good")).state == "used"
    second = store.do(examples.add, new(1, "bad"))
    assert (second.id, second.split, second.created_at) == (first.id, first.split, first.created_at)
    assert (second.target, second.state) == ("bad", "new")
    assert store.do(examples.list_, 10) == [second]


def test_a_label_must_be_a_choice(store: Store) -> None:
    with pytest.raises(LabelNotInChoices, match="'fine' is not one of the choices of task 'sentiment': 'good', 'bad'"):
        store.do(examples.add, new(1, "fine"))
    assert store.do(examples.list_, 10) == []


def test_an_import_counts_what_it_did_and_declares_tasks(store: Store) -> None:
    store.do(imports.add_many, [new(1), new(2)])
    many = [new(1), new(2, "bad"), new(3), new(3), new(4, "Hello.", "greeting", "demonstration"), new(5, "dog", "pet")]
    assert store.do(imports.add_many, many) == {"added": 3, "replaced": 1, "unchanged": 2}
    assert (store.do(tasks.get, "greeting").choices, store.do(tasks.get, "greeting").metric) == ([], "loss")
    assert (store.do(tasks.get, "pet").choices, store.do(tasks.get, "pet").open) == (["dog"], True)


@pytest.mark.parametrize("broken", [new(9, "fine"), new(9, ""), new(9, task=""), new(9, "x\ud800", "pet")])
def test_an_import_with_a_broken_line_stores_nothing(store: Store, broken: NewExample) -> None:
    before = fill(store, 5)
    many = [new(3, "bad"), new(7), new(8, "cat", "animal"), broken, new(10)]
    with pytest.raises(InvalidLine, match=r"^line 4: .*nothing of this file was stored"):
        store.do(imports.add_many, many)
    with pytest.raises(InvalidLine, match=r"^line 17: "):
        store.do(imports.add_many, [new(7), replace(broken, line=17)])
    assert store.do(examples.list_, 10) == before
    assert store.do(tasks.find, "animal") is None


def test_training_takes_the_new_ones_first_and_replays_used_ones(store: Store) -> None:
    old = [store.do(examples.add, example).id for example in of_split("train", 30)[:20]]
    store.do(examples.mark_used, old)
    fresh = [store.do(examples.add, example).id for example in of_split("train", 30)[20:]]
    taken = [example.id for example in store.do(examples.for_training, 15, 7)]
    assert taken[:10] == fresh[::-1]
    assert set(taken[10:]) < set(old)
    assert len(set(taken)) == 15
    assert taken == [example.id for example in store.do(examples.for_training, 15, 7)]
    samples = {tuple(e.id for e in store.do(examples.for_training, 15, seed)[10:]) for seed in range(5)}
    assert len(samples) > 1
    assert [example.id for example in store.do(examples.for_training, 4, 7)] == fresh[:-5:-1]
    assert len(store.do(examples.for_training, 1000, 7)) == 30


def test_holdout_is_never_trained_on_and_excluded_ones_take_part_in_nothing(store: Store) -> None:
    everything = fill(store, 100)
    held = [example.id for example in everything if example.split == "holdout"]
    training = [example.id for example in everything if example.split == "train"]
    store.do(examples.exclude, [held[0], training[0]])
    assert {example.id for example in store.do(examples.for_training, 1000, 0)} == set(training[1:])
    assert [example.id for example in store.do(examples.holdout, "sentiment", 1000)] == held[1:]
    assert [example.id for example in store.do(examples.holdout, "sentiment", 2)] == held[1:3]
    assert store.do(examples.holdout, "other", 10) == []
    store.do(examples.mark_used, [training[0]])
    assert {example.id for example in store.do(examples.list_, 10, state="excluded")} == {held[0], training[0]}


def test_a_correction_during_a_pass_stays_new(store: Store) -> None:
    untouched, corrected = (store.do(examples.add, example) for example in of_split("train", 2))
    store.do(lambda db: db.execute("UPDATE examples SET updated_at = '2026-01-01T00:00:00.000Z'").rowcount)
    began = "2026-01-01T00:00:01.000Z"
    store.do(examples.add, NewExample("sentiment", "label", corrected.input, "bad"))
    store.do(examples.mark_used, [untouched.id, corrected.id], as_of=began)
    assert {e.id: e.state for e in store.do(examples.list_, 10)} == {untouched.id: "used", corrected.id: "new"}


def test_lists_are_filtered_and_paged_from_the_newest(store: Store) -> None:
    everything = fill(store, 50)
    store.do(examples.add, new(1, "dog", "pet"))
    assert [example.task for example in store.do(examples.list_, 10, task="pet")] == ["pet"]
    held = [example for example in everything if example.split == "holdout"]
    assert store.do(examples.list_, 3, 1, task="sentiment", split="holdout") == held[1:4]


def test_a_long_import_leaves_room_for_others_and_is_all_or_nothing(tmp_path: Path) -> None:
    """While 20 000 examples are stored, somebody else waits for milliseconds; what is refused leaves nothing."""
    many = [NewExample("t", "label", {"prompt": f"{i} " * 20}, f"{i % 2}", line=i + 1) for i in range(20_000)]
    wrong = [*many[:-1], NewExample("closed", "label", {"prompt": "x"}, "maybe", line=20_000)]
    choices = Task("closed", ["yes", "no"], False, "accuracy", None, "config", "2026-01-01")
    waits: list[float] = []

    async def run(store: Store) -> dict[str, int]:
        await store.call(tasks.declare, choices)

        async def ask() -> None:
            while True:
                began = time.monotonic()
                await store.call(examples.count_new)
                waits.append(time.monotonic() - began)
                await asyncio.sleep(0.005)

        asking = asyncio.create_task(ask())
        with pytest.raises(InvalidLine, match="line 20000: label 'maybe'"):
            await imports.add(store, await asyncio.to_thread(imports.prepare, wrong))
        assert await store.call(examples.count) == {}
        assert [task.name for task in await store.call(tasks.all)] == ["closed"]
        counts = await imports.add(store, await asyncio.to_thread(imports.prepare, many))
        asking.cancel()
        return counts

    with closing(Store(tmp_path / "import.db")) as store:
        assert asyncio.run(run(store)) == {"added": 20_000, "replaced": 0, "unchanged": 0}
        assert store.do(imports.add_many, many[:10]) == {"added": 0, "replaced": 0, "unchanged": 10}
        left = store.do(lambda db: db.execute("SELECT name FROM sqlite_temp_master").fetchall())
    assert left == []
    assert len(waits) > 20
    assert sorted(waits)[-len(waits) // 20] < 1.0
