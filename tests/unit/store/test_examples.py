import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from agentd import ids
from agentd.errors import InvalidLine, LabelNotInChoices
from agentd.store import events, examples, imports, passes, selection, tasks
from agentd.store.database import Store
from agentd.store.examples import Example, NewExample
from agentd.store.normalise import input_text
from agentd.store.row import to_json
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


def judged(text: str, answer: str, how: dict[str, Any], kind: str = "thumb") -> NewExample:
    return NewExample("prose", kind, {"prompt": text}, to_json({"answer": answer, **how}))


def test_lines_that_say_less_do_not_replace_what_is_better(store: Store) -> None:
    good, bad = judged("a", "Rain.", {"good": True}), judged("a", "Snow.", {"good": False})
    assert store.do(imports.add_many, [good, bad]) == {"added": 1, "replaced": 0, "unchanged": 1}
    assert store.do(imports.add_many, [bad, good, good]) == {"added": 0, "replaced": 1, "unchanged": 2}
    right = NewExample("prose", "demonstration", {"prompt": "a"}, "Hail.")
    assert store.do(imports.add_many, [right]) == {"added": 0, "replaced": 1, "unchanged": 0}
    scored = judged("a", "Rain.", {"score": 9.0}, "score")
    others = [judged("b", f"{n} mm", {"score": float(n)}, "score") for n in (3, 5, 4)]
    assert store.do(imports.add_many, [scored, *others]) == {"added": 1, "replaced": 1, "unchanged": 2}
    kept = {example.input["prompt"]: example.target for example in store.do(examples.list_, 10)}
    assert kept == {"a": "Hail.", "b": others[1].target}


@pytest.mark.parametrize("kind", ["preference", "thumb", "score"])
def test_pairs_and_verdicts_are_for_free_text(store: Store, kind: str) -> None:
    label = NewExample("mood", "label", {"prompt": "a"}, "good")
    with pytest.raises(InvalidLine, match=r"line 2: .* are labels"):
        store.do(imports.add_many, [label, NewExample("mood", kind, {"prompt": "b"}, "{}")])
    assert store.do(examples.list_, 10) == []


def of_split(split: str, n: int) -> list[NewExample]:
    matching = [new(i) for i in range(20 * n) if examples.split_of(examples.text_key(new(i))) == split]
    return matching[:n]


def test_the_split_is_a_function_of_task_and_input_alone() -> None:
    # Frozen: if these change, holdout examples of existing installations become training data.
    first = {"messages": [{"role": "user", "content": "film 0"}]}
    assert examples.identify("sentiment", first) == "c6b9004c6f956b1cfe91200e5de71ba7"
    assert examples.identify("other", first) != examples.identify("sentiment", first)
    assert [examples.split_of(f"{n:08x}" + "0" * 24) for n in (0, 1, 4, 5)] == ["holdout", "train", "train", "holdout"]
    assert examples.identify("t", {"a": 1, "b": 2}) == examples.identify("t", {"b": 2, "a": 1})
    assert examples.text_key(NewExample("sentiment", "label", first, "good")) == "39c822e4d59fa49ac6343beceba5150d"


@pytest.mark.parametrize(
    "alike",
    [
        "Café, a fine film ",
        "cafe\u0301, a fine film",
        "Café,\r\na\tfine  film",
        "CAFÉ, A FINE FILM",
        "caf\u200bé, a fine film\ufeff",
    ],
)
def test_texts_that_are_alike_are_on_one_side(alike: str) -> None:
    def key(content: str, **more: Any) -> str:
        return examples.text_key(
            NewExample("t", "label", {"messages": [{"role": "user", "content": content}]}, "x", **more)
        )

    plain = "café, a fine film"
    assert key(alike) == key(plain)
    assert key("no " + alike) != key(plain)
    other_prompt = {"messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": alike}]}
    assert examples.text_key(NewExample("t", "label", other_prompt, "x")) == key(plain)
    rendered = f"Good or bad?\n\n{alike}\n\nAnswer:"
    text = input_text({"messages": [{"role": "user", "content": rendered}]}, "Good or bad?\n\n{text}\n\nAnswer:")
    assert key(rendered, text=text) == key(plain)


def test_a_short_turn_is_told_apart_by_the_others() -> None:
    def key(*contents: str) -> str:
        roles = ["user", "assistant", "user"]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return examples.text_key(NewExample("t", "label", {"messages": messages}, "x"))

    assert key("Lights", "Which?", "all") != key("Lights", "Where?", "all")


@pytest.mark.parametrize(
    "said",
    [
        *("CAFÉ", "cafe\u0301", " café ", "ca\u200bfé", "Café\n", "\u202acafé\u202c", "\u2067café\u2069", "\u061ccafé"),
        *("caf\u034fé", "café\u3164", "café\ufe0f", "caf\u2063é", "\u180ecafé"),
    ],
)
def test_a_label_is_the_choice_that_it_looks_like(store: Store, said: str) -> None:
    for text in ("café", "tea", said):
        store.do(imports.add_many, [NewExample("drinks", "label", {"prompt": text * 2}, text)])
    assert store.do(tasks.get, "drinks").choices == ["café", "tea"]
    assert {example.target for example in store.do(examples.list_, 9, task="drinks")} == {"café", "tea"}


def test_labels_that_only_look_alike_in_a_declaration_are_kept_apart(store: Store) -> None:
    store.do(tasks.declare, Task("flags", ["us", "US"], False, "accuracy", None, "config", ids.now()))
    for said in ("us", "US"):
        assert store.do(tasks.admit, "flags", "label", said)[1] == said
    with pytest.raises(LabelNotInChoices):
        store.do(tasks.admit, "flags", "label", "Us")


def test_counters_follow_every_change(store: Store) -> None:
    def counted(db: Database) -> list[Any]:
        label = "CASE kind WHEN 'label' THEN target ELSE '' END"
        counts = f"SELECT task, split, state, {label}, count(*) FROM examples GROUP BY 1, 2, 3, 4"
        return sorted(db.execute(counts).fetchall())

    def counters(db: Database) -> list[Any]:
        return sorted(db.execute("SELECT task, split, state, label, n FROM example_counts WHERE n != 0").fetchall())

    rows = fill(store, 40)
    store.do(examples.mark_used, [row.id for row in rows[:10]])
    store.do(examples.exclude, [row.id for row in rows[10:13]])
    store.do(imports.add_many, [new(i, "bad") for i in range(5)])
    store.do(lambda db: db.execute("DELETE FROM examples WHERE id = ?", [rows[20].id]))
    assert store.do(counters) == store.do(counted)


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
    assert (store.do(tasks.get, "greeting").choices, store.do(tasks.get, "greeting").metric) == ([], "auto")
    assert (store.do(tasks.get, "pet").choices, store.do(tasks.get, "pet").open) == (["dog"], True)


@pytest.mark.parametrize(
    "broken", [new(9, "fine"), new(9, ""), new(9, " \n"), new(9, task=""), new(9, "x\ud800", "pet")]
)
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
    ids = [example.id for example in store.do(selection.for_training, 20, 7).examples]
    assert ids[:10] == fresh[::-1]
    assert set(ids[10:]) < set(old)
    assert len(set(ids)) == 20
    assert ids == [example.id for example in store.do(selection.for_training, 20, 7).examples]
    samples = {tuple(e.id for e in store.do(selection.for_training, 20, seed).examples[10:]) for seed in range(5)}
    assert len(samples) > 1
    few = [example.id for example in store.do(selection.for_training, 4, 7).examples]
    assert len(few) == 4
    assert few[:2] == [fresh[-1], fresh[0]], "the newest and the oldest"
    assert set(few[2:]) < set(old), "what is new leaves half of the places to what was learned before"
    assert len(store.do(selection.for_training, 1000, 7).examples) == 30


def test_excluded_examples_come_back_with_a_larger_context(store: Store) -> None:
    rows = fill(store, 10)
    assert store.do(examples.readmit, 4096) == 0
    store.do(examples.exclude, [row.id for row in rows[:3]])
    store.do(events.add, examples.UNUSABLE, "too long", data={"context": 1024})
    assert store.do(examples.readmit, 1024) == 0
    assert sum(store.do(examples.excluded).values()) == 3
    assert store.do(examples.readmit, 2048) == 3
    assert store.do(examples.excluded) == {}
    assert store.do(events.latest, 1)[0].message.startswith("3 that could not be used")
    assert store.do(examples.readmit, 2048) == 0


def test_holdout_is_never_trained_on_and_excluded_ones_take_part_in_nothing(store: Store) -> None:
    everything = fill(store, 100)
    held = [example.id for example in everything if example.split == "holdout"]
    training = [example.id for example in everything if example.split == "train"]
    store.do(examples.exclude, [held[0], training[0]])
    assert {example.id for example in store.do(selection.for_training, 1000, 0).examples} == set(training[1:])
    assert [example.id for example in store.do(selection.holdout, "sentiment", 1000)] == held[1:]
    assert [example.id for example in store.do(selection.holdout, "sentiment", 2)] == held[1:3]
    assert store.do(selection.holdout, "other", 10) == []
    store.do(examples.mark_used, [training[0]])
    assert {example.id for example in store.do(examples.list_, 10, state="excluded")} == {held[0], training[0]}


def test_a_correction_during_a_pass_stays_new(store: Store) -> None:
    untouched, corrected = (store.do(examples.add, example) for example in of_split("train", 2))
    store.do(lambda db: db.execute("UPDATE examples SET updated_at = '2026-01-01T00:00:00.000Z'").rowcount)
    began = "2026-01-01T00:00:01.000Z"
    store.do(examples.add, NewExample("sentiment", "label", corrected.input, "bad"))
    store.do(examples.mark_used, [untouched.id, corrected.id], as_of=began)
    assert {e.id: e.state for e in store.do(examples.list_, 10)} == {untouched.id: "used", corrected.id: "new"}


def test_what_got_another_target_since_it_was_found_unusable_stays(store: Store) -> None:
    untouched, corrected = (store.do(examples.add, new(i)) for i in (1, 2))
    time.sleep(0.01)
    store.do(examples.add, new(2, "bad"))
    store.do(examples.exclude, [untouched.id, corrected.id], corrected.updated_at)
    assert {e.id: e.state for e in store.do(examples.list_, 10)} == {untouched.id: "excluded", corrected.id: "new"}


def test_lists_are_filtered_and_paged_from_the_newest(store: Store) -> None:
    everything = fill(store, 50)
    store.do(examples.add, new(1, "dog", "pet"))
    assert [example.task for example in store.do(examples.list_, 10, task="pet")] == ["pet"]
    held = [example for example in everything if example.split == "holdout"]
    assert store.do(examples.list_, 3, 1, task="sentiment", split="holdout") == held[1:4]


@pytest.mark.slow
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


def stamped(db: Database, moment: str, id: str) -> None:
    db.execute("UPDATE examples SET updated_at = ? WHERE id = ?", [moment, id])


def test_how_long_new_examples_have_waited(store: Store) -> None:
    assert store.do(examples.new_since, 2, ["sentiment"]) == (None, None)
    rows = [store.do(examples.add, new(n)) for n in range(20)]
    train = [example for example in rows if example.split == "train"]
    for day, example in enumerate(train, 1):
        moment = f"2026-01-{day:02}T00:00:00.000Z"
        store.do(stamped, moment, example.id)
    assert store.do(examples.new_since, 3, ["sentiment"]) == ("2026-01-01T00:00:00.000Z", "2026-01-03T00:00:00.000Z")
    assert store.do(examples.new_since, 21, ["sentiment"]) == ("2026-01-01T00:00:00.000Z", None)


def test_an_example_from_the_future_is_learned_once(store: Store) -> None:
    """Stamped before the clock was set back: it may not stay new for years and start pass after pass."""
    example = store.do(examples.add, new(1))
    store.do(lambda db: db.execute("UPDATE examples SET updated_at = '2126-01-01T00:00:00.000Z'"))
    row = store.do(passes.create, "examples", 0, 0, {})
    store.do(examples.mark_used, [example.id], row.created_at)
    (stored,) = store.do(examples.list_, 10)
    assert stored.state == "used"
    assert stored.updated_at == row.created_at
