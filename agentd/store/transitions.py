"""State changes of a pass that concern more rows than its own: each is one transaction."""

from dataclasses import dataclass

from sqlite_utils import Database

from agentd.store import examples, passes, revisions, trials

RESUMPTIONS = 3  # of a pass from the same place of its training


@dataclass(frozen=True)
class Learned:
    """Which new examples a pass has spent, as they were at `as_of` (ISO 8601): those that it learned, and those whose
    weight was drawn against them."""

    examples: tuple[str, ...] = ()
    as_of: str | None = None


def reject(db: Database, number: int, reason: str, learned: Learned) -> None:
    """The gate said no. What was learned from is no longer new: the same examples would give the same verdict."""
    passes.advance(db, number, "rejected", reason=reason)
    examples.mark_used(db, learned.examples, learned.as_of)


def begin_trial(db: Database, revision: int, number: int, attempts: int, learned: Learned) -> None:
    """Only now is what was learned no longer new: a pass that ends before has learned nothing that lasts."""
    revisions.set_state(db, revision, "trial")
    passes.advance(db, number, "trial")
    trials.start(db, revision, number, attempts)
    examples.mark_used(db, learned.examples, learned.as_of)


def commit(db: Database, revision: int, number: int) -> None:
    """The trial is passed. `number` is 0 where no pass made the revision."""
    trials.finish(db, revision, "passed")
    revisions.set_state(db, revision, "committed")
    again = bool(number) and passes.get(db, number).options.get("consolidate")
    revisions.activate(db, revision, f"pass {number} committed" + (", learned again from the base" if again else ""))
    if number:
        passes.advance(db, number, "committed")


def take_back(db: Database, revision: int, number: int, reason: str) -> None:
    trials.finish(db, revision, "failed", reason)
    revisions.set_state(db, revision, "rolled_back", reason)
    if number:
        passes.advance(db, number, "rolled_back", reason=reason)


def abandon(db: Database, number: int, reason: str, *, keep_trial: bool = False, park: bool = False) -> str:
    """Ends a pass that was cut short, in any state, and returns the state it has then.

    A trial is taken back, or left to be resumed after a restart (`keep_trial`); a pass that has something to go on
    from is left for that, too (`park`).
    """
    row = passes.get(db, number)
    if row.state in passes.TERMINAL or (park and row.state == "parked"):
        return row.state
    running = trials.running(db)
    if running is not None and running.pass_id == number:
        if keep_trial:
            return row.state
        take_back(db, running.revision, number, reason)
        return "rolled_back"
    state = "parked" if park else "failed"
    passes.advance(db, number, state, reason=reason)
    discard_staged(db, number, reason)
    return state


def resume(db: Database, number: int, place: list[int]) -> str | None:
    """A parked pass is about to go on, from this place of its training. Where it has gone on from the same place too
    often already, something in what follows ends the daemon each time: then the pass is ended, and the reason returned.
    """
    row = passes.get(db, number)
    in_vain = row.resumed["in_vain"] + 1 if row.resumed.get("place") == place else 0
    if in_vain >= RESUMPTIONS:
        reason = f"it went on from the same place {in_vain} times, and was cut short each time: {row.reason}"
        abandon(db, number, reason)
        return reason
    facts = {"times": row.resumed.get("times", 0) + 1, "in_vain": in_vain, "place": place}
    passes.advance(db, number, "resumed", resumed=facts, reason=None, revision=None)
    return None


def discard_staged(db: Database, number: int, reason: str) -> None:
    """Marks what a pass staged and never tried out as discarded."""
    for row in revisions.all(db):
        if row.pass_id == number and row.state == "staged":
            revisions.set_state(db, row.id, "discarded", reason)
