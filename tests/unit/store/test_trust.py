"""Whom feedback is believed from, and taking it back."""

import asyncio

import pytest
from sqlite_utils import Database

from agentd import ids
from agentd.errors import Conflict, NotFound
from agentd.store import (
    events,
    examples,
    feedback,
    forgetting,
    imports,
    inferences,
    passes,
    revisions,
    selection,
    tasks,
)
from agentd.store.database import Store
from agentd.store.examples import NewExample
from agentd.store.feedback import Feedback, NewFeedback
from agentd.store.forgetting import Selection
from agentd.store.tasks import Task
from tests.support.store_samples import recorded, revision

WEIGHTS = {"human": 1.0, "program": 0.5, "implicit": 0.0}


def say(
    db: Database,
    /,
    inference: str,
    value: str,
    source: str = "human",
    author: str = "uid:1",
    quarantine: str | None = None,
) -> Feedback:
    new = NewFeedback(inference, "label", value, task="mood", source=source, author=author, quarantine=quarantine)
    return feedback.add(db, new, WEIGHTS)[0]


def target(db: Database, row: Feedback) -> str:
    return next(e.target for e in examples.list_(db, 1000) if e.id == row.example_id)


def test_the_same_again_changes_nothing(store: Store) -> None:
    inference = store.do(recorded)
    first = store.do(say, inference, "good")
    again = store.do(say, inference, "good")
    other = store.do(say, inference, "good", author="uid:2")
    assert (first.state, again.state, other.state) == ("accepted", "duplicate", "accepted")
    assert first.id in (again.reason or "")
    assert len(store.do(examples.list_, 10)) == 1


def test_who_is_believed_less_does_not_overrule(store: Store) -> None:
    inference = store.do(recorded)
    first = store.do(say, inference, "good")
    assert store.do(say, inference, "bad", "program").state == "outweighed"
    assert store.do(target, first) == "good"
    assert store.do(say, inference, "bad", "human", "uid:2").state == "accepted"
    assert store.do(target, first) == "bad"

    doubtful = store.do(recorded, "another")
    second = store.do(say, doubtful, "bad", "program")
    assert store.do(examples.list_, 1)[0].weight == 0.5
    store.do(say, doubtful, "bad")
    assert store.do(examples.list_, 1)[0].weight == 1.0
    assert store.do(target, second) == "bad"


def test_a_source_of_weight_0_declares_nothing_until_it_is_released(store: Store) -> None:
    inference = store.do(recorded)
    row = store.do(say, inference, "good", "implicit")
    assert (row.state, row.example_id, row.reason) == ("quarantined", None, "feedback.weight_implicit is 0")
    assert store.do(tasks.all) == []
    (released,) = store.do(feedback.release, [row.id], WEIGHTS)
    assert released.state == "accepted"
    assert store.do(target, released) == "good"
    with pytest.raises(Conflict, match="accepted, not quarantined"):
        store.do(feedback.release, [row.id])
    with pytest.raises(NotFound):
        store.do(feedback.release, ["nothing"])


def test_a_source_that_cannot_make_up_its_mind_is_noise(store: Store) -> None:
    inference = store.do(recorded)
    answers = [("good", "bad")[n % 2] for n in range(feedback.CHANGES_OF_MIND + 1)]
    states = [store.do(say, inference, answer).state for answer in answers]
    assert states == ["accepted"] * feedback.CHANGES_OF_MIND + ["quarantined"]
    assert store.do(say, inference, "bad", author="uid:2").state == "accepted"


def test_what_the_daemon_quarantines_is_kept_and_has_no_effect(store: Store) -> None:
    inference = store.do(recorded)
    row = store.do(say, inference, "good", quarantine="a flood")
    assert (row.state, row.reason) == ("quarantined", "a flood")
    assert store.do(examples.list_, 10) == []
    assert store.do(feedback.quarantined, "uid:1", "human") == 1
    assert store.do(feedback.list_, 10, 0, {"state": "quarantined"}) == [row]


def fill(store: Store, n: int, weight: float = 1.0) -> None:
    store.do(
        imports.add_many, [NewExample("t", "label", {"prompt": f"{i}"}, f"{i % 2}", weight=weight) for i in range(n)]
    )


def test_examples_take_part_in_proportion_to_their_weight(store: Store) -> None:
    fill(store, 1000, weight=0.25)
    drawn = [{e.id for e in store.do(selection.for_training, 1000, seed).examples} for seed in (1, 2)]
    assert all(150 < len(each) < 250 for each in drawn)  # 800 are for training: expected 200, deviation 12
    assert drawn[0] != drawn[1]
    again = store.do(selection.for_training, 1000, 1)
    assert {e.id for e in again.examples} == drawn[0]
    assert len(again.undrawn) + len(drawn[0]) == store.do(examples.count_new)
    assert not drawn[0] & set(again.undrawn)
    assert store.do(examples.expected_new)["t"] == pytest.approx(store.do(examples.count_new) / 4)
    assert len(store.do(selection.for_training, 10, 1).undrawn) < 100, "only those whose turn came"
    judged = store.do(selection.holdout, "t", 1000)
    assert 25 < len(judged) < 75
    assert store.do(selection.holdout, "t", 1000) == judged


def learned(db: Database, state: str, ids: list[str], role: str = "train", parent: int = 0) -> int:
    """A pass over the examples, and the revision it made."""
    row = passes.create(db, "manual", parent, 0, {})
    passes.add_examples(db, row.id, [(id, role) for id in ids])
    number = revisions.next_id(db)
    for step in ("planned", "tapped", "trained", "gated", "staged", "trial"):
        passes.advance(db, row.id, step)
    passes.advance(db, row.id, state, revision=number)
    revisions.add(db, revision(number, parent, row.id, state=state))
    examples.mark_used(db, ids)
    return number


def test_many_new_examples_do_not_push_out_what_judged_before(store: Store) -> None:
    fill(store, 200)
    old = [e.id for e in store.do(selection.holdout, "t", 1000)]
    store.do(learned, "committed", old, "holdout")
    assert store.do(selection.established)["t"] == set(old)
    flood = [NewExample("t", "label", {"prompt": f"flood {i}"}, "1") for i in range(2000)]
    store.do(imports.add_many, flood)
    chosen = [e.id for e in store.do(selection.holdout, "t", 40)]
    assert len(chosen) == 40
    assert len(set(chosen) & set(old)) == 20
    # Another answer makes it another example: it has judged nothing yet.
    changed = store.do(examples.list_, 1000, 0, "t", "holdout")[-1]
    assert changed.id in old
    store.do(imports.add_many, [NewExample("t", "label", changed.input, "2" if changed.target == "1" else "1")])
    assert changed.id not in store.do(selection.established)["t"]


def test_forgetting_takes_everything_along_and_names_who_learned_from_it(store: Store) -> None:
    inference_ids = [store.do(recorded, f"text {i}", author="uid:7" if i == 0 else "uid:8") for i in range(3)]
    rows = [store.do(say, id, "good", author="uid:7" if i == 0 else "uid:8") for i, id in enumerate(inference_ids)]
    ids = [row.example_id or "" for row in rows]
    direct = store.do(learned, "committed", ids[:2])
    child = store.do(learned, "committed", ids[2:], parent=direct)
    judged_only = store.do(learned, "committed", ids[:1], "holdout")

    looked = store.do(forgetting.look, Selection(feedback=(rows[0].id,)))
    assert store.do(feedback.count) == 3, "looking changes nothing"
    forgotten = store.do(forgetting.forget, Selection(feedback=(rows[0].id,)))
    assert looked == forgotten
    assert (forgotten.feedback, forgotten.examples, forgotten.inferences) == ([rows[0].id], ids[:1], inference_ids[:1])
    assert (forgotten.revisions, forgotten.inherited) == ([direct, child], [child])
    assert judged_only not in forgotten.revisions
    assert forgotten.passes == [1, 3]
    assert {e.id for e in store.do(examples.list_, 10)} == set(ids[1:])
    assert {i.id for i in store.do(inferences.latest, 10)} == set(inference_ids[1:])
    marked = {row.id: row.forgotten for row in store.do(revisions.all)}
    assert marked == {0: 0, direct: 1, child: 1, judged_only: 0}
    assert str(direct) in store.do(events.latest, 1)[0].message

    assert store.do(forgetting.clean_ancestor, child) == 0
    assert store.do(forgetting.discard_holders, "rebuilt") == [direct, child]
    assert {e.state for e in store.do(examples.list_, 10)} == {"new"}, "what they learned otherwise is new again"
    assert store.do(revisions.get, child).state == "discarded"


def test_forgetting_an_author_an_answer_an_example_or_a_tag(store: Store) -> None:
    def fresh(db: Database, author: str) -> tuple[str, Feedback]:
        inference = recorded(db, f"text of {author}", author=author)
        new = NewFeedback(inference, "label", "good", task="mood", author=author, tags={"room": author})
        return inference, feedback.add(db, new)[0]

    pairs = [store.do(fresh, f"uid:{n}") for n in range(4)]
    store.do(forgetting.forget, Selection(authors=("uid:0",)))
    with pytest.raises(NotFound, match="uid:0"):  # nothing is left of them, or there never was anything
        store.do(forgetting.look, Selection(authors=("uid:0",)))
    store.do(forgetting.forget, Selection(inferences=(pairs[1][0],)))
    store.do(forgetting.forget, Selection(tags=(("room", "uid:2"),)))
    assert [row.id for row in store.do(feedback.list_, 10)] == [pairs[3][1].id]
    assert [row.id for row in store.do(inferences.latest, 10)] == [pairs[3][0]]
    forgotten = store.do(forgetting.forget, Selection(examples=(pairs[3][1].example_id or "",)))
    assert forgotten.examples == [pairs[3][1].example_id]
    assert store.do(examples.list_, 10) == []
    for wrong in (Selection(feedback=("x",)), Selection(inferences=("x",)), Selection(examples=("x",))):
        with pytest.raises(NotFound):
            store.do(forgetting.forget, wrong)


def test_what_others_vouch_for_stays_with_their_answer(store: Store) -> None:
    first, second = store.do(recorded), store.do(recorded)  # the same question, asked twice
    theirs = store.do(say, second, "bad", author="uid:2")
    mine = store.do(say, first, "good", author="uid:1")
    assert mine.example_id == theirs.example_id
    assert store.do(target, mine) == "good"
    store.do(forgetting.forget, Selection(authors=("uid:1",)))
    (left,) = store.do(examples.list_, 10)
    assert (left.target, left.author) == ("bad", "uid:2")


def test_in_pieces_the_same_is_forgotten_as_at_once(store: Store) -> None:
    """Also where it is asked for again after some pieces."""
    shared, own = store.do(recorded), store.do(recorded, "another", author="uid:1")
    theirs = store.do(say, shared, "bad", author="uid:2")
    for inference in (shared, own, store.do(recorded, "a third")):
        store.do(say, inference, "good", author="uid:1")
    imported = [NewExample("mood", "label", {"prompt": f"{n}"}, "good", author="uid:1") for n in range(3)]
    store.do(imports.add_many, imported)
    store.do(recorded, "no one said anything", author="uid:1")
    chosen = Selection(authors=("uid:1",))
    looked = store.do(forgetting.look, chosen)
    assert store.do(forgetting.size, looked) > 1000 * len(looked.examples)
    assert store.do(forgetting.forget_some, chosen, looked, 1)
    assert store.do(forgetting.forget_some, chosen, looked, 1)
    again = store.do(forgetting.look, chosen)
    assert 0 < len(again.examples) <= len(looked.examples)
    pieces = 0
    while store.do(forgetting.forget_some, chosen, again, 1, WEIGHTS):
        pieces += 1
    assert pieces >= 4
    with pytest.raises(NotFound):
        store.do(forgetting.look, chosen)
    assert [row.id for row in store.do(feedback.list_, 10)] == [theirs.id]
    (left,) = store.do(examples.list_, 10)
    assert (left.target, left.author) == ("bad", "uid:2")


def test_nothing_forgotten_is_left_in_the_files(store: Store) -> None:
    secret = "the-attic-key-is-under-the-mat"
    inference = store.do(recorded, secret, task=secret)
    row = store.do(feedback.add, NewFeedback(inference, "label", secret, task=secret), WEIGHTS)[0]
    store.do(forgetting.forget, Selection(feedback=(row.id,)))
    asyncio.run(store.checkpoint())
    for file in store.path.parent.iterdir():
        assert secret.encode() not in file.read_bytes(), file.name


def test_with_the_last_word_on_a_task_its_labels_and_its_name_go(store: Store) -> None:
    first, second = store.do(recorded, "one", task="secret"), store.do(recorded, "two", task="secret")
    for inference, label in ((first, "me"), (second, "you")):
        store.do(feedback.add, NewFeedback(inference, "label", label, task="secret"), WEIGHTS)
    number = store.do(passes.create, "manual", 0, 0, {}).id
    store.do(passes.update, number, gate={"reason": "task secret got worse", "tasks": {"secret": {"n": 1}, "mood": {}}})
    store.do(passes.advance, number, "refused", reason="task secret: 1 holdout, not secretly")
    store.do(events.add, "left out", "task secret: too few", pass_id=number)

    store.do(forgetting.forget, Selection(inferences=(first,)))
    assert store.do(tasks.get, "secret").choices == ["you"]
    store.do(forgetting.forget, Selection(inferences=(second,)))
    assert store.do(tasks.find, "secret") is None
    row = store.do(passes.get, number)
    assert row.reason == "task (forgotten): 1 holdout, not secretly"
    assert row.gate == {"reason": "task (forgotten) got worse", "tasks": {"(forgotten)": {"n": 1}, "mood": {}}}
    assert "secret" not in str([event.message for event in store.do(events.latest, 100)])


def test_what_the_configuration_declares_is_not_forgotten(store: Store) -> None:
    store.do(tasks.declare, Task("mood", ["good", "bad"], False, "accuracy", None, "config", ids.now()))
    inference = store.do(recorded, task="mood")
    store.do(feedback.add, NewFeedback(inference, "label", "good", task="mood"), WEIGHTS)
    store.do(forgetting.forget, Selection(inferences=(inference,)))
    assert store.do(tasks.get, "mood").choices == ["good", "bad"]
