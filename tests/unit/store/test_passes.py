import json

import pytest

from agentd import ids
from agentd.errors import NotFound
from agentd.store import feedback, passes, transitions
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from agentd.store.recovery import recover
from tests.support.store_samples import recorded

WHOLE_WAY = ["planned", "tapped", "trained", "gated", "staged", "trial", "committed"]


def begun(store: Store, *states: str) -> int:
    id = store.do(passes.create, "manual", 0, 7, {"method": "mezo"}).id
    for state in states:
        store.do(passes.advance, id, state)
    return id


def test_a_pass_is_written_down_before_each_act(store: Store) -> None:
    id = begun(store)
    first = store.do(passes.get, id)
    assert (first.state, first.trigger, first.seed, first.options) == ("triggered", "manual", 7, {"method": "mezo"})
    assert (first.shortfall_bytes, first.plan, first.finished_at) == (0, {}, None)
    for state in WHOLE_WAY:
        assert store.do(passes.unfinished)[0].id == id
        assert store.do(passes.advance, id, state, phases={state: 1.5}).state == state
    last = store.do(passes.get, id)
    assert last.phases == {"committed": 1.5}
    assert last.finished_at is not None
    assert store.do(passes.unfinished) == []


@pytest.mark.parametrize(
    ("way", "end"),
    [
        ([], "refused"),
        (["planned"], "refused"),
        (["planned", "trained", "gated"], "rejected"),  # pure ZO needs no tap
        (WHOLE_WAY[:-1], "rolled_back"),
        *((WHOLE_WAY[:n], "failed") for n in range(7)),
    ],
)
def test_every_other_end(store: Store, way: list[str], end: str) -> None:
    ended = store.do(passes.advance, begun(store, *way), end, reason="because", shortfall_bytes=12)
    assert (ended.state, ended.reason, ended.shortfall_bytes) == (end, "because", 12)
    assert ended.finished_at is not None


@pytest.mark.parametrize(
    ("way", "state"),
    [
        ([], "trained"),
        (["planned"], "gated"),
        (["planned", "tapped"], "planned"),
        (["planned", "tapped", "trained"], "staged"),
        (WHOLE_WAY[:5], "committed"),
        (WHOLE_WAY, "rolled_back"),
        (["refused"], "failed"),
        ([], "asleep"),
    ],
)
def test_no_step_is_skipped_and_no_end_undone(store: Store, way: list[str], state: str) -> None:
    id = begun(store, *way)
    before = store.do(passes.get, id)
    with pytest.raises(ValueError, match=f"cannot become {state}"):
        store.do(passes.advance, id, state, reason="no")
    assert store.do(passes.get, id) == before


def test_columns_are_checked_by_name(store: Store) -> None:
    id = begun(store)
    changed = store.do(passes.update, id, predicted={"adam": 3}, predicted_bytes=3, gate={"loss": float("nan")})
    assert (changed.predicted, changed.predicted_bytes) == ({"adam": 3}, 3)
    assert json.dumps(changed.as_json(), allow_nan=False)
    assert changed.gate == {"loss": None}
    with pytest.raises(ValueError, match="no columns colour"):
        store.do(passes.update, id, colour="red")
    with pytest.raises(ValueError, match="see advance"):
        store.do(passes.update, id, state="committed")
    with pytest.raises(NotFound, match="no pass '99'"):
        store.do(passes.update, 99, n_train=1)


def test_latest_pages_from_the_newest(store: Store) -> None:
    numbers = [begun(store) for _ in range(4)]
    assert [row.id for row in store.do(passes.latest, 2, 1)] == [numbers[2], numbers[1]]


def test_which_examples_a_pass_used_is_a_query(store: Store) -> None:
    id = begun(store)
    rows = [store.do(feedback.add, NewFeedback(store.do(recorded, str(n)), "label", "x"))[0] for n in range(3)]
    members = [(str(rows[0].example_id), "train"), (str(rows[1].example_id), "dev")]
    store.do(passes.add_examples, id, members)
    store.do(passes.add_examples, id, members)
    learned = """SELECT feedback.id FROM feedback JOIN pass_examples USING (example_id)
                 WHERE pass_id = ? AND role = 'train'"""
    assert store.do(lambda db: db.execute(learned, [id]).fetchall()) == [(rows[0].id,)]


def test_steps_come_back_in_order_and_may_come_in_parts(store: Store) -> None:
    id = begun(store)
    zo = {"phase": "zo", "step": 1, "loss": float("inf"), "seconds": 2.0, "seed": 2**64 - 1, "epsilon": 1e-3}
    bp = [{"phase": "bp", "step": step, "loss": 1.0 / step, "seconds": 0.5} for step in (2, 1)]
    store.do(passes.add_steps, id, [zo, *bp])
    store.do(passes.add_steps, id, [{"phase": "bp", "step": 2, "dev_loss": 0.4, "seconds": 0.75}])
    rows = store.do(passes.steps, id)
    assert [(row["phase"], row["step"], row["loss"], row["dev_loss"]) for row in rows] == [
        ("bp", 1, 1.0, None),
        ("bp", 2, 0.5, 0.4),
        ("zo", 1, None, None),
    ]
    assert rows[2]["seed"] == "18446744073709551615"
    with pytest.raises(ValueError, match="no columns lsos"):
        store.do(passes.add_steps, id, [{"phase": "bp", "step": 3, "lsos": 1.0, "seconds": 0.5}])


def test_the_wall_clock_knows_when_the_last_pass_ended(store: Store) -> None:
    """So that `trigger.every` outlasts restarts."""
    assert store.do(passes.last_end) is None
    id = begun(store)
    assert store.do(passes.last_end) is None
    store.do(passes.advance, id, "refused")
    ended = store.do(passes.last_end)
    assert ended is not None
    assert ended == store.do(passes.get, id).finished_at
    assert 0 <= ids.seconds_since(ended) < 60
    begun(store)
    assert store.do(passes.last_end) == ended


def test_answers_are_forgotten_with_their_examples_and_with_old_passes(store: Store) -> None:
    def answers(id: int) -> list[str]:
        return [each["example"] for each in store.do(passes.get, id).gate["tasks"]["home"]["answers"]]

    numbers = []
    for _ in range(3):
        numbers.append(begun(store))
        entries = [{"example": name, "input": f"say {name}"} for name in ("a", "b")]
        gate = {"tasks": {"home": {"n": 20, "answers": entries}, "other": {"n": 5}}}
        store.do(passes.update, numbers[-1], gate=gate)
    store.do(passes.forget_answers, numbers[2], {"a"})
    assert answers(numbers[2]) == ["b"]
    store.do(passes.retain_answers, 2)
    assert [answers(number) for number in numbers] == [[], ["a", "b"], ["b"]]
    assert store.do(passes.get, numbers[0]).gate["tasks"]["home"]["n"] == 20


def test_what_a_restart_cuts_short_is_parked_where_it_can_go_on_and_failed_where_not(store: Store) -> None:
    first, second = begun(store, "planned", "tapped"), begun(store, "planned", "tapped", "trained")
    notes = store.do(recover, lambda number: number == second)
    assert notes == [
        f"pass {first}: the daemon stopped while the pass was tapped",
        f"pass {second}: the daemon stopped while the pass was trained",
    ]
    assert store.do(passes.get, first).state == "failed"
    parked = store.do(passes.parked)
    assert parked is not None
    assert (parked.id, parked.finished_at) == (second, None)
    assert store.do(recover, lambda number: True) == [], "it waits still"
    assert len(store.do(recover, lambda number: False)) == 1, "what it was to go on from is gone"
    assert store.do(passes.get, second).state == "failed"


def test_a_pass_goes_on_as_often_as_it_gets_further_and_three_times_where_it_does_not(store: Store) -> None:
    id = begun(store, "planned", "tapped")

    def cut_short() -> None:
        assert store.do(transitions.abandon, id, "killed", park=True) == "parked"

    for step in range(10):
        cut_short()
        assert store.do(transitions.resume, id, [0, step]) is None
        row = store.do(passes.get, id)
        assert (row.state, row.reason, row.resumed["times"]) == ("resumed", None, step + 1)
        store.do(passes.advance, id, "planned")
    for _ in range(2):
        cut_short()
        assert store.do(transitions.resume, id, [0, 9]) is None
    cut_short()
    reason = store.do(transitions.resume, id, [0, 9])
    assert reason == "it went on from the same place 3 times, and was cut short each time: killed"
    assert store.do(passes.get, id).state == "failed"
    assert store.do(passes.get, id).reason == reason
