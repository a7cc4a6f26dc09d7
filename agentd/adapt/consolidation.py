"""When passes that stand on each other are to be learned again from the base: stacking them costs drift, what the
first ones learned fades, and what labels meant before they changed is in the way."""

from sqlite_utils import Database

from agentd.config.schema import ConsolidateSettings
from agentd.store import events, passes, revisions
from agentd.store.meanings import CHANGED, TAKEN_BACK

_SINCE = 2  # passes on each other from which on drift alone is a reason: one that begins at the base may need as much


def due(db: Database, settings: ConsolidateSettings, max_drift: float) -> str | None:
    """Why the next pass is to begin at the base; None while there is no reason. What was tried counts, however it
    ended: the next try needs as many passes again."""
    if not settings.depth:
        return None
    serving, tried = revisions.committed(db), passes.last_consolidation(db)
    line = [revisions.get(db, id) for id in revisions.lineage(db, serving)]
    since = [row for row in line if row.pass_id is not None and row.pass_id > tried]
    changed = events.last(db, (CHANGED, TAKEN_BACK))
    if changed is not None and changed.kind == CHANGED and since and since[0].created_at < changed.at:
        return f"labels of task {changed.data['task']} have changed their meaning"
    if len(since) >= settings.depth:
        return f"{len(since)} passes stand on each other (adapt.consolidate.depth)"
    if len(since) >= _SINCE and since[0].pass_id is not None:
        drift = passes.get(db, since[0].pass_id).gate.get("drift")
        if drift is not None and drift >= settings.drift * max_drift:
            return f"what serves has drifted {drift:.3f} nats per token from it (adapt.consolidate.drift)"
    return None
