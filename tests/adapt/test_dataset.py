import json
from pathlib import Path

import pytest

from agentd.adapt import dataset as datasets
from agentd.adapt.dataset import is_dev, select
from agentd.config import Gate
from agentd.errors import PassRefused
from agentd.store import examples, imports, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample

LABELS = ["no", "yes"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "agentd.db")
    store.do(lambda db: tasks.declare(db, tasks.Task("likes", LABELS, False, "accuracy", None, "config", "2026-01-01")))
    return store


def add(store: Store, n: int, task: str = "likes", labels: list[str] | None = None, first: int = 0) -> None:
    new = [
        NewExample(
            task,
            "label" if labels is not None else "demonstration",
            {"prompt": f"{task} {i}"},
            labels[i % len(labels)] if labels else f"answer {i}",
            None,
        )
        for i in range(first, first + n)
    ]
    store.do(imports.add_many, new)


def test_holdout_is_never_trained_on(store: Store) -> None:
    add(store, 300, labels=LABELS)
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=Gate()))
    assert not {m.example.id for m in data.of("train", "dev")} & {m.example.id for m in data.of("holdout")}
    assert {m.example.split for m in data.of("train", "dev")} == {"train"}
    assert {m.example.split for m in data.of("holdout")} == {"holdout"}
    assert len(data.members) == 300
    assert 15 <= len(data.of("dev")) <= 50
    assert [m.number for m in data.members] == list(range(300))
    store.close()


def test_the_role_of_an_example_never_changes() -> None:
    ids = [f"{i:032x}" for i in range(4000)]
    assert [is_dev(id) for id in ids] == [is_dev(id) for id in ids]


def test_a_task_with_too_little_holdout_waits_and_another_is_adapted(store: Store) -> None:
    add(store, 300, labels=LABELS)
    store.do(lambda db: tasks.declare(db, tasks.Task("small", [], False, "loss", None, "config", "2026-01-01")))
    add(store, 20, task="small")
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=Gate()))
    assert "gate.min_holdout" in data.left_out["small"]
    assert {m.example.task for m in data.of("train", "dev")} == {"likes"}
    assert {m.example.task for m in data.of("holdout")} == {"likes", "small"}  # judged all the same
    store.close()


def test_one_label_only_teaches_nothing(store: Store) -> None:
    add(store, 300, labels=["yes"])
    with pytest.raises(PassRefused, match="same label"):
        store.do(lambda db: select(db, limit=1000, seed=1, gate=Gate()))
    store.close()


def test_nothing_to_learn_from_is_refused_with_the_reason(store: Store) -> None:
    with pytest.raises(PassRefused, match="nothing to learn from"):
        store.do(lambda db: select(db, limit=1000, seed=1, gate=Gate()))
    add(store, 10, labels=LABELS)
    with pytest.raises(PassRefused, match=r"gate\.min_holdout asks for 20"):
        store.do(lambda db: select(db, limit=1000, seed=1, gate=Gate()))
    store.close()


def test_a_pass_mixes_new_examples_with_old_ones(store: Store) -> None:
    add(store, 300, labels=LABELS)
    old = store.do(lambda db: [e.id for e in examples.for_training(db, 1000, 0)])
    store.do(examples.mark_used, old)
    add(store, 50, labels=LABELS, first=1000)
    data = store.do(lambda db: select(db, limit=100, seed=1, gate=Gate()))
    learned = [m.example for m in data.of("train", "dev")]
    assert len(learned) == 100
    assert {e.id for e in learned} & set(old)
    assert sum(e.state == "new" for e in learned) == store.do(examples.count_new)
    store.close()


def test_what_cannot_be_encoded_is_left_out_with_its_reason(store: Store, tmp_path: Path) -> None:
    add(store, 300, labels=LABELS)
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=Gate()))
    encoded = tmp_path / "tokens.jsonl"
    bad = data.of("train")[0]
    with encoded.open("w") as file:
        for member in data.members:
            tree = {"error": "too long"} if member is bad else {"choices": [], "correct": 0, "target": []}
            file.write(json.dumps(tree) + "\n")
    usable, tokens = datasets.usable(data, encoded)
    assert bad.number not in tokens
    assert len(usable.members) == len(data.members) - 1
    assert usable.left_out[f"example {bad.example.id}"] == "too long"
    store.close()
