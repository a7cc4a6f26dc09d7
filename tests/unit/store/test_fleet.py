"""Rounds of a fleet in the database: what was made is stored with its pass's end, and what left is counted."""

import pytest

from agentd import ids
from agentd.errors import NotFound
from agentd.store import events, fleet, passes
from agentd.store.database import Store
from agentd.store.fleet import TAKE, TRAIN, FleetRound


def begun(store: Store, number: int = 1, action: str = TRAIN, bytes_in: int = 0) -> int:
    """A pass for a round; its number."""
    id = store.do(passes.create, "manual", 0, 7, {"fleet": f"r/{number}"}).id
    how = {"kind": None, "examples": None, "rho": None, "norm": None, "sent_at": None, "result_bytes": None}
    row = FleetRound(
        "r", number, action, "home", "server:9092", "d" * 64, None, id, bytes_in=bytes_in, bytes_out=0,
        created_at=ids.now(), **how,
    )  # fmt: skip
    store.do(fleet.begin, row)
    return id


def made(store: Store, id: int, result: bytes = b"12345", rho: float | None = None) -> None:
    for state in ("planned", "trained"):
        store.do(passes.advance, id, state)
    store.do(lambda db: fleet.contributed(db, id, result, kind="ledger", examples=9, rho=rho, norm=0.5))


def test_what_was_made_is_there_with_its_pass_and_counts_when_it_is_handed_out(store: Store) -> None:
    id = begun(store)
    with pytest.raises(NotFound):
        store.do(fleet.send, "r", 1)
    made(store, id)
    assert store.do(passes.get, id).state == "contributed"
    row = store.do(fleet.find, "r", 1, TRAIN)
    assert row is not None
    assert (row.kind, row.examples, row.result_bytes, row.bytes_out, row.sent_at) == ("ledger", 9, 5, 0, None)
    assert store.do(fleet.send, "r", 1) == store.do(fleet.send, "r", 1) == b"12345"
    row = store.do(fleet.find, "r", 1, TRAIN)
    assert row is not None
    assert row.bytes_out == 10
    assert row.sent_at is not None
    (event,) = [each for each in store.do(events.latest, 10) if each.kind == "sent to the fleet"]
    assert event.message == "ledger, 5 bytes, to fleet 'home' at server:9092"


def test_a_pass_that_cannot_end_leaves_no_result(store: Store) -> None:
    id = begun(store)
    with pytest.raises(ValueError, match="cannot become contributed"):
        store.do(lambda db: fleet.contributed(db, id, b"x", kind="ledger", examples=1, rho=None, norm=None))
    row = store.do(fleet.find, "r", 1, TRAIN)
    assert row is not None
    assert (row.kind, row.result_bytes) == (None, None)


def test_a_round_that_came_to_nothing_gets_another_pass(store: Store) -> None:
    first = begun(store, bytes_in=100)
    store.do(passes.advance, first, "failed", reason="the daemon stopped")
    second = begun(store, bytes_in=100)
    row = store.do(fleet.find, "r", 1, TRAIN)
    assert row is not None
    assert (row.pass_id, row.bytes_in) == (second, 200)
    assert len(store.do(fleet.latest, 10)) == 1


def test_only_the_newest_results_are_kept(store: Store) -> None:
    for number in range(6):
        made(store, begun(store, number), rho=0.1)
    sizes = [row.result_bytes for row, _ in store.do(fleet.latest, 10)]
    assert sizes == [5, 5, 5, 5, None, None]
    totals = store.do(fleet.totals)
    assert totals.contributions == 6
    assert totals.rho == pytest.approx(0.6)


def test_one_contribution_without_noise_leaves_no_guarantee(store: Store) -> None:
    made(store, begun(store, 1), rho=0.1)
    made(store, begun(store, 2))
    begun(store, 3, TAKE, bytes_in=7)
    totals = store.do(fleet.totals)
    assert (totals.rho, totals.bytes_in) == (None, 7)
    assert store.do(fleet.newest, "r") == 3
    assert store.do(fleet.newest, "other") is None


def test_files_of_the_fleet_are_kept_by_their_sha256(store: Store) -> None:
    for number in range(5):
        store.do(fleet.keep, str(number), bytes([number]))
    store.do(fleet.leads_to, "4", "w")
    assert [store.do(fleet.kept, str(number)) for number in range(5)] == [
        *(None, None),
        *((b"\x02", None), (b"\x03", None), (b"\x04", "w")),
    ]
