import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from agentd.adapt.planning import dataset as datasets
from agentd.adapt.planning.dataset import is_dev, select
from agentd.config.schema import GateSettings
from agentd.errors import PassRefused
from agentd.learn.encoded import Encoded
from agentd.store import examples, imports, selection, tasks
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
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
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
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
    assert "gate.min_holdout" in data.left_out["small"]
    assert {m.example.task for m in data.of("train", "dev")} == {"likes"}
    assert {m.example.task for m in data.of("holdout")} == {"likes", "small"}  # judged all the same
    store.close()


def test_one_label_only_teaches_nothing(store: Store) -> None:
    add(store, 300, labels=["yes"])
    with pytest.raises(PassRefused, match="same label"):
        store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
    store.close()


def test_nothing_to_learn_from_is_refused_with_the_reason(store: Store) -> None:
    with pytest.raises(PassRefused, match="nothing to learn from"):
        store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
    add(store, 10, labels=LABELS)
    with pytest.raises(PassRefused, match=r"gate\.min_holdout asks for 20"):
        store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
    store.close()


def test_a_pass_mixes_new_examples_with_old_ones(store: Store) -> None:
    add(store, 300, labels=LABELS)
    old = store.do(lambda db: [e.id for e in selection.for_training(db, 1000, 0).examples])
    store.do(examples.mark_used, old)
    add(store, 50, labels=LABELS, first=1000)
    data = store.do(lambda db: select(db, limit=100, seed=1, gate=GateSettings()))
    learned = [m.example for m in data.of("train", "dev")]
    assert len(learned) == 100
    assert {e.id for e in learned} & set(old)
    assert sum(e.state == "new" for e in learned) == store.do(examples.count_new)
    store.close()


def test_what_cannot_be_encoded_is_left_out_with_its_reason(store: Store, tmp_path: Path) -> None:
    add(store, 300, labels=LABELS)
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
    encoded = tmp_path / "tokens.jsonl"
    bad = data.of("train")[0]
    with encoded.open("w") as file:
        for member in data.members:
            tree = {"error": "too long"} if member is bad else asdict(Encoded.of([[1]], [], 0, [(0, 0, 2)]))
            file.write(json.dumps(tree) + "\n")
    usable, tokens = datasets.usable(data, encoded)
    assert bad.number not in tokens
    assert len(usable.members) == len(data.members) - 1
    assert usable.unusable == {bad.example.id: "too long"}
    store.close()


def in_roles(store: Store, limit: int, *roles: str) -> Counter[tuple[str, str]]:
    """How many examples of each task and answer a pass takes."""
    data = store.do(lambda db: select(db, limit=limit, seed=1, gate=GateSettings()))
    return Counter((m.task.name, m.example.target) for m in data.of(*roles))


def test_an_import_that_is_sorted_by_label_is_learned_as_one_that_is_not(store: Store) -> None:
    for label, first, n in (("no", 0, 900), ("yes", 1000, 300)):
        add(store, n, labels=[label], first=first)
    counts = in_roles(store, 200, "train", "dev")
    assert sum(counts.values()) == 200
    assert counts["likes", "yes"] == pytest.approx(50, abs=3)  # its share of all
    gate = GateSettings(max_holdout=40)
    held = store.do(lambda db: select(db, limit=200, seed=1, gate=gate)).of("holdout")
    assert len(held) == 40
    assert sum(m.example.target == "yes" for m in held) == pytest.approx(10, abs=3)


def test_a_rare_label_is_not_left_out(store: Store) -> None:
    add(store, 20, labels=["yes"])
    add(store, 2000, labels=["no"], first=100)
    assert in_roles(store, 50, "train", "dev")["likes", "yes"] >= 1


def test_the_newest_and_the_oldest_of_a_label_take_part(store: Store) -> None:
    for start in range(0, 2000, 100):
        add(store, 100, labels=LABELS, first=start)
    data = store.do(lambda db: select(db, limit=100, seed=1, gate=GateSettings()))
    numbers = [int(m.example.input["prompt"].split()[1]) for m in data.of("train", "dev")]
    assert sum(n < 300 for n in numbers) == pytest.approx(50, abs=5)
    assert sum(n > 1700 for n in numbers) == pytest.approx(50, abs=5)


def test_a_large_task_does_not_push_others_out(store: Store) -> None:
    add(store, 200, labels=LABELS)
    store.do(lambda db: tasks.declare(db, tasks.Task("loud", LABELS, False, "accuracy", None, "config", "2026-01-01")))
    add(store, 3000, task="loud", labels=LABELS)
    counts = in_roles(store, 200, "train", "dev")
    assert sum(n for (task, _), n in counts.items() if task == "likes") == 100
    store.do(lambda db: tasks.declare(db, tasks.Task("mono", LABELS, False, "accuracy", None, "config", "2026-01-01")))
    add(store, 3000, task="mono", labels=["yes"])
    assert in_roles(store, 200, "train", "dev") == counts, "a task with one label cannot be learned and takes no place"
    store.close()


def test_what_starts_a_pass_is_what_it_could_learn_from_and_judge(store: Store) -> None:
    add(store, 85, labels=LABELS)
    readiness = store.do(datasets.readiness, GateSettings())
    held = len([e for e in store.do(examples.list_, 1000) if e.split == "holdout"])
    assert held < 20
    assert readiness.new == 0
    assert readiness.waiting == {"likes": f"{held} are held out, gate.min_holdout asks for 20"}
    assert readiness.missing(64) == {
        "likes": {"more": 5 * (20 - held), "until": "first pass", "reason": readiness.waiting["likes"]}
    }
    add(store, 85, labels=LABELS, first=100)
    readiness = store.do(datasets.readiness, GateSettings())
    assert readiness.waiting == {}
    assert readiness.new == store.do(examples.count_new)
    store.do(lambda db: tasks.declare(db, tasks.Task("mono", LABELS, False, "accuracy", None, "config", "2026-01-01")))
    add(store, 200, task="mono", labels=["no"])
    again = store.do(datasets.readiness, GateSettings())
    assert (again.new, list(again.waiting)) == (readiness.new, ["mono"])
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
    assert sum(m.example.state == "new" for m in data.of("train", "dev")) == readiness.new
    store.close()


def test_what_is_missing_until_a_pass_is_told_by_task(store: Store) -> None:
    gate, n_train = GateSettings(min_holdout=5), 0
    for n in range(1, 41):
        add(store, 1, labels=LABELS, first=n)
        readiness = store.do(datasets.readiness, gate)
        n_train = store.do(examples.count_new)
        missing = readiness.missing(10)
        if readiness.new >= 10:
            break
        assert missing["likes"]["more"] > 0
        assert missing["likes"]["until"] == "first pass"
    assert not missing
    assert (readiness.ready, readiness.new) == (["likes"], n_train)
    store.do(examples.mark_used, [e.id for e in store.do(examples.list_, 100, split="train")])
    missing = store.do(datasets.readiness, gate).missing(10)
    assert missing == {"likes": {"more": 13, "until": "next pass", "reason": None}}  # a fifth of them is held out
    store.do(lambda db: tasks.declare(db, tasks.Task("mono", LABELS, False, "accuracy", None, "config", "2026-01-01")))
    add(store, 200, task="mono", labels=["no"])
    mono = store.do(datasets.readiness, gate).missing(10)["mono"]
    assert mono["more"] is None
    assert "same label" in mono["reason"]
    store.close()


def test_what_is_hardly_believed_starts_no_pass(store: Store) -> None:
    new = [
        NewExample("likes", "label", {"prompt": f"{i}"}, LABELS[i % 2], weight=w)
        for i, w in enumerate([0.01, 1.0] * 100)
    ]
    store.do(imports.add_many, new)
    readiness = store.do(datasets.readiness, GateSettings())
    believed = [e for e in store.do(examples.list_, 1000, split="train") if e.weight == 1]
    assert readiness.new == len(believed) + (store.do(examples.count_new) - len(believed)) // 100
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings()))
    assert len(data.undrawn) + len(data.of("train", "dev")) == store.do(examples.count_new)
    store.close()


def test_an_import_does_not_push_out_what_others_have_learned(store: Store) -> None:
    add(store, 200, labels=LABELS)
    store.do(examples.mark_used, [e.id for e in store.do(examples.list_, 1000, split="train")])
    store.do(lambda db: tasks.declare(db, tasks.Task("loud", LABELS, False, "accuracy", None, "config", "2026-01-01")))
    add(store, 3000, task="loud", labels=LABELS)
    counts = in_roles(store, 200, "train", "dev")
    assert sum(n for (task, _), n in counts.items() if task == "likes") == 100
    assert sum(n for (task, _), n in counts.items() if task == "loud") == 100
    store.close()


def judged(store: Store, kind: str, values: list[object], task: str = "prose") -> list[dict[str, object]]:
    """The lines of a dataset with an example of this kind for each value."""
    name = {"thumb": "good", "score": "score"}[kind]
    new = [
        NewExample(task, kind, {"prompt": f"{task} {i}"}, json.dumps({"answer": f"answer {i}", name: value}))
        for i, value in enumerate(values)
    ]
    store.do(imports.add_many, new)
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings(min_holdout=1)))
    assert [member.number for member in data.members] == list(range(len(data.members)))
    return [member.as_line() for member in data.members]


def test_a_thumb_asks_for_its_answer_or_for_anything_else(store: Store) -> None:
    lines = judged(store, "thumb", [True, False] * 20)
    assert {(int(str(line["target"]).split()[1]) % 2, line["objective"]) for line in lines} == {
        (0, "likelihood"),
        (1, "unlikelihood"),
    }


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-200, 0.0), (1e300, 0.0), (1.0, -1000.0)])
def test_scores_count_by_how_much_better_they_are_than_the_others(store: Store, scale: float, shift: float) -> None:
    scores = [(i % 5) / 4 * scale + shift for i in range(100)]
    lines = judged(store, "score", list(scores))
    by_score = {int(str(line["target"]).split()[1]) % 5: (line["objective"], line["weight"]) for line in lines}
    assert by_score[0] == ("unlikelihood", 1.0)
    assert by_score[4] == ("likelihood", 1.0)
    assert by_score[1][0] == "unlikelihood"
    assert by_score[3][0] == "likelihood"
    assert 0.5 < float(str(by_score[3][1])) < 1


@pytest.mark.parametrize(("score", "objective"), [(1.0, "likelihood"), (0.0, "unlikelihood")])
def test_scores_that_are_all_the_same(store: Store, score: float, objective: str) -> None:
    assert {line["objective"] for line in judged(store, "score", [score] * 30)} == {objective}


def test_scores_that_say_nothing_have_had_their_turn(store: Store) -> None:
    """They would stay new, and start pass after pass on the few that do."""
    judged(store, "score", [0.0, 1.0, *[0.5] * 100])
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings(min_holdout=1)))
    learned = [member.example.id for member in data.of("train", "dev")]
    assert len(learned) <= 2
    new = {example.id for example in store.do(examples.list_, 1000, split="train", state="new")}
    assert {*learned, *data.undrawn} == new


def test_a_preference_is_two_answers(store: Store) -> None:
    target = json.dumps({"chosen": "a", "rejected": {"role": "assistant", "content": "", "tool_calls": [1]}})
    store.do(imports.add_many, [NewExample("prose", "preference", {"prompt": f"p {i}"}, target) for i in range(30)])
    data = store.do(lambda db: select(db, limit=1000, seed=1, gate=GateSettings(min_holdout=1)))
    line = data.members[0].as_line()
    assert (line["choices"], line["target"], line["rejected"]["tool_calls"]) == ([], "a", [1])
    assert len(data.members[0].answers) == 2
    assert (data.members[0].target, data.members[0].answered) == ("a", False)
