"""After a start: what had begun when the daemon ended, and which files belong to a row."""

from collections.abc import Callable

from sqlite_utils import Database

from agentd.store import events, passes, revisions, scores, transitions


def recover(db: Database, parked: Callable[[int], bool] = lambda number: False) -> list[str]:
    """Every pass that was cut short is failed with the reason, or parked if it has something to go on from, as `parked`
    says; a trial is left to be resumed. Answers end as far as they had come."""
    scores.end_streams(db)
    notes = []
    for row in passes.unfinished(db):
        reason = f"the daemon stopped while the pass was {row.state}"
        if row.state == "parked" and parked(row.id):
            continue
        state = transitions.abandon(db, row.id, reason, keep_trial=True, park=parked(row.id))
        if state in ("failed", "parked"):
            events.add(db, f"pass {state}", reason, pass_id=row.id)
            notes.append(f"pass {row.id}: {reason}")
    return notes


def known_directories(db: Database) -> set[int]:
    """Revisions whose files must be kept."""
    return {row.id for row in revisions.all(db) if row.state in ("committed", "trial", "rolled_back")}
