from agentd.store import events
from agentd.store.database import Store


def test_an_event_comes_back_as_it_was(store: Store) -> None:
    added = store.do(
        events.add, "gate", "rejected: p = 0.4", pass_id=3, revision=2, data={"p": 0.4, "kl": float("inf")}
    )
    (event,) = store.do(events.latest, 10)
    assert event == added
    assert event.as_json()["data"] == {"p": 0.4, "kl": None}


def test_latest_reads_as_a_log_and_a_follower_misses_none(store: Store) -> None:
    ids = [store.do(events.add, "test", str(n), pass_id=n % 2).id for n in range(10)]

    def latest(*args: int, **kw: int) -> list[int]:
        return [event.id for event in store.do(events.latest, *args, **kw)]

    assert latest(3) == ids[-3:]
    assert latest(3, after_id=ids[1]) == ids[2:5]
    assert latest(3, after_id=0) == ids[:3]
    assert latest(3, ids[9]) == []
    assert latest(2, pass_id=0) == [ids[6], ids[8]]
    assert latest(2, after_id=ids[3], pass_id=0) == [ids[4], ids[6]]
