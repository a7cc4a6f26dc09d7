"""Past corrections for a prompt: which are the nearest, and which must never be among them."""

import json
import random
from pathlib import Path

import pytest
from sqlite_utils import Database

from agentd.store import examples, forgetting, imports, recall_index, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample
from agentd.store.forgetting import Selection
from agentd.store.terms import terms_of


def new(text: str, label: str = "on", task: str = "home", **more: object) -> NewExample:
    return NewExample(task, "label", {"messages": [{"role": "user", "content": text}]}, label, **more)  # type: ignore[arg-type]


def train(*texts: str) -> list[str]:
    """Those of the texts that are not held out."""
    return [text for text in texts if examples.split_of(examples.text_key(new(text))) == "train"]


def texts(store: Store, query: str, n: int = 3, task: str = "home", **more: object) -> list[str]:
    ids = store.do(recall_index.nearest, task, query, n, **more)  # type: ignore[arg-type]
    rows = {row.id: row.input["messages"][0]["content"] for row in store.do(examples.list_, 1000)}
    return [rows[id] for id in ids]


def test_the_nearest_come_first_and_are_of_the_same_task(store: Store) -> None:
    lights = train(*(f"switch on the lamp of room {n}" for n in range(20)))
    shutters = train(*(f"close every shutter on floor {n}" for n in range(20)))
    for text in lights + shutters:
        store.do(examples.add, new(text))
    store.do(examples.add, new(lights[0], task="elsewhere"))
    assert texts(store, f"please {lights[3]}", 1) == [lights[3]]
    assert set(texts(store, "the shutter of floor", 5)) <= set(shutters)
    assert len(texts(store, "nothing that anybody said", 4)) == 4  # the newest, where nothing is alike
    assert texts(store, lights[0], 5, task="none") == []


def test_holdout_and_what_is_set_aside_are_never_recalled(store: Store) -> None:
    said = [f"what is the weather in town {n}" for n in range(40)]
    for text in said:
        store.do(examples.add, new(text))
    held = {row.input["messages"][0]["content"] for row in store.do(examples.list_, 100, split="holdout")}
    assert held
    assert not held & set(texts(store, said[0], 40))
    excluded = store.do(examples.list_, 100, split="train")[0]
    store.do(examples.exclude, [excluded.id])
    assert len(texts(store, said[0], 40)) == 40 - len(held) - 1
    without = store.do(examples.list_, 100, split="train")[-1]
    found = texts(store, said[0], 40, without={without.text_key})
    assert without.input["messages"][0]["content"] not in found


@pytest.mark.parametrize(
    "query", ['"', "NEAR(a b)", "lamp OR", "scope : x", "*", "a AND NOT (", "terms:lamp^2", "\x00", "-"]
)
def test_what_a_user_writes_is_no_query_language(store: Store, query: str) -> None:
    lamps = train("lamp one", "lamp two", "lamp three")
    for text in lamps:
        store.do(examples.add, new(text))
    assert set(texts(store, query)) == set(lamps)


def test_scripts_without_blanks_are_cut_into_pairs() -> None:
    assert terms_of("打开厨房的灯 now") == ["打开", "开厨", "厨房", "房的", "的灯", "now"]
    assert terms_of("रसोई की बत्ती") == ["रसोई", "की", "बत्ती"]
    assert terms_of("Straße, STRASSE\u00ad!") == ["strasse", "strasse"]
    assert terms_of("灯 灯光") == ["灯", "灯光"]
    assert len(terms_of("word " * 5000)) == 512
    long = " ".join(f"word{i}" for i in range(500_000))
    assert terms_of(long) == [f"word{i}" for i in [*range(256), *range(499_744, 500_000)]]


def test_a_sentence_is_found_by_a_part_of_it_in_any_script(store: Store) -> None:
    said = train(
        "请打开厨房的灯",
        "今天天气怎么样",
        "ช่วยปิดไฟในครัว",
        "วันนี้อากาศเป็นอย่างไร",
        "キッチンの電気をつけて",
        "明日の天気は",
    )
    for text in said:
        store.do(examples.add, new(text))
    for part, whole in [("厨房的灯", said[0]), ("ไฟในครัว", "ช่วยปิดไฟในครัว"), ("電気をつけて", "キッチンの電気をつけて")]:
        if whole in said:
            assert texts(store, part, 1) == [whole]


def test_of_near_duplicates_the_trusted_one_is_recalled(store: Store) -> None:
    base = "the heating in the guest room is far too loud at night and nobody can sleep there"
    variants = train(*(f"{base} {end}" for end in ("now", "again", "today", "honestly", "really", "sadly")))
    for n, text in enumerate(variants):
        store.do(examples.add, new(text, weight=1.0 if n == 1 else 0.5))
    other = train(*(f"is the garage door open, number {n}" for n in range(5)))[0]
    store.do(examples.add, new(other))
    assert texts(store, f"{base} now", 2) == [variants[1], other]


def test_a_source_of_low_weight_does_not_displace_a_trusted_one(store: Store) -> None:
    trusted, doubtful = train(*(f"switch the radio on in room {n}" for n in range(9)))[:2]
    store.do(examples.add, new(trusted))
    store.do(examples.add, new(doubtful + " please", weight=0.3))
    for text in train(*(f"some other text {n}" for n in range(9))):
        store.do(examples.add, new(text))
    assert texts(store, "switch the radio on please", 1) == [trusted]


def test_what_is_imported_is_indexed_once(store: Store) -> None:
    many = [new(f"import number {n} of a lamp") for n in range(50)]
    for _ in range(2):
        store.do(imports.add_many, many)
    count = "SELECT (SELECT count(*) FROM recall_texts), (SELECT count(*) FROM examples WHERE split = 'train')"
    indexed, stored = store.do(lambda db: db.execute(count).fetchone())
    assert indexed == stored > 30


def test_what_is_forgotten_is_in_no_index_and_no_file(store: Store, tmp_path: Path) -> None:
    secret = next(text for n in range(99) if (text := f"xylophonist quagmire {n}") in train(text))
    store.do(examples.add, new(secret))
    for text in train(*(f"an ordinary sentence {n}" for n in range(200))):
        store.do(examples.add, new(text))
    id = examples.identify("home", new(secret).input)
    assert store.do(recall_index.nearest, "home", "quagmire", 1) == [id]
    store.do(forgetting.forget, Selection(examples=(id,)))
    assert id not in store.do(recall_index.nearest, "home", "quagmire", 500)
    store.raw(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    assert b"xylophon" not in (tmp_path / "agentd.db").read_bytes()
    store.do(lambda db: db.execute("INSERT INTO recall_index (recall_index) VALUES ('integrity-check')"))


def test_a_task_with_many_examples_is_looked_at_in_part_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_READ", 20), ("_MOST", 5), ("_LEAST", 2), ("_CANDIDATES", 20)):
        monkeypatch.setattr(recall_index, name, value)
    many = train(*(f"the lamp of room {n} painted p{n}" for n in range(200)))
    store.do(imports.add_many, [new(text) for text in many])
    assert texts(store, many[3], 1) == [many[3]]  # a rare term finds what is old
    newest = many[-20:]
    assert set(texts(store, "the lamp of a room", 3)) <= set(newest)


def test_two_common_terms_together_find_what_is_old(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_READ", 20), ("_MOST", 5), ("_LEAST", 2)):
        monkeypatch.setattr(recall_index, name, value)
    both = train(*(f"dim the cellar, number {n}" for n in range(9)))[0]
    others = train(*(text for n in range(40) for text in (f"dim the hall h{n}", f"open the cellar c{n}")))
    store.do(imports.add_many, [new(text) for text in (both, *others)])
    assert texts(store, "dim a cellar", 1) == [both]


def test_a_look_up_reads_no_more_of_a_large_store(store: Store) -> None:
    """Steps of SQLite's virtual machine, which are the same on every machine."""
    words = [f"w{n}" for n in range(300)]
    draw = random.Random(0)

    def steps(n: int) -> int:
        store.do(imports.add_many, [new(" ".join(draw.choices(words, k=12)) + f" u{n}-{i}") for i in range(n)])
        count = 0

        def tick() -> int:
            nonlocal count
            count += 1
            return 0

        store.raw(lambda connection: connection.set_progress_handler(tick, 100))
        assert len(store.do(recall_index.nearest, "home", " ".join(words[:12]), 4)) == 4
        store.raw(lambda connection: connection.set_progress_handler(None, 0))
        return count

    steps(3000)
    small, large = steps(3000), steps(9000)
    assert large < 1.3 * small


def test_labels_that_are_edited_are_recalled_as_they_are_now(store: Store) -> None:
    text = train(*(f"dim the lamp {n}" for n in range(9)))[0]
    store.do(examples.add, new(text, "dim"))
    store.do(tasks.edit, "home", {"dim": "darker"}, [])

    def target(db: Database) -> str:
        (id,) = recall_index.nearest(db, "home", "dim", 1)
        return str(db.execute("SELECT target FROM examples WHERE id = ?", [id]).fetchone()[0])

    assert store.do(target) == "darker"
    assert json.dumps(store.do(examples.count))


def test_what_says_nearly_the_same_can_be_left_out(store: Store) -> None:
    base = "the heating in the guest room is far too loud at night and nobody can sleep there"
    twins = train(*(f"{base} {end}" for end in ("now", "again", "today", "honestly", "really", "sadly")))
    others = train(*(f"the heating on floor {n} is cold" for n in range(6)))
    for text in (*twins, *others):
        store.do(examples.add, new(text))
    assert texts(store, base, 1)[0] in twins
    assert set(texts(store, base, 3, apart=True)) <= set(others)
