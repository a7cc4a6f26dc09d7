"""Does a revision on trial get more negative feedback than the one before it? A sequential test, looked at as often as
one likes (Wald 1945): the chance that it ever speaks up against a revision that is no worse is at most alpha."""

import json
import math
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

_EARLIER = 500  # pieces of feedback on the committed revision that its rate is taken from


@dataclass(frozen=True)
class Rate:
    """Answers of a revision that feedback called bad, among those that got feedback."""

    negative: int
    total: int


def rate(db: Database, revision: int, limit: int = _EARLIER) -> Rate:
    """Per answer, by the latest accepted feedback that judges it. A comment judges nothing."""
    rows = db.execute(
        "SELECT feedback.kind, feedback.value, inferences.output FROM feedback"
        " JOIN inferences ON inferences.id = inference_id"
        " WHERE inferences.revision = ? AND state IN ('accepted', 'duplicate') AND feedback.kind != 'comment'"
        " AND feedback.rowid = (SELECT max(rowid) FROM feedback AS f WHERE f.inference_id = inferences.id"
        " AND f.kind != 'comment' AND f.state IN ('accepted', 'duplicate'))"
        " ORDER BY feedback.rowid DESC LIMIT ?",
        [revision, limit],
    )
    verdicts = [_negative(kind, value, output) for kind, value, output in rows]
    return Rate(sum(verdicts), len(verdicts))


def more_negative(trial: Rate, committed: Rate, alpha: float) -> str | None:
    """What is wrong, or None. The alternative is half-way between the committed revision's rate and nothing but
    complaints; without any earlier feedback half of the answers may be bad."""
    expected = (committed.negative + 1) / (committed.total + 2)
    worse = (1 + expected) / 2
    positive = trial.total - trial.negative
    evidence = trial.negative * math.log(worse / expected) + positive * math.log((1 - worse) / (1 - expected))
    if evidence < math.log(1 / alpha):
        return None
    return (
        f"{trial.negative} of {trial.total} answers got negative feedback; with the committed revision it was "
        f"{committed.negative} of {committed.total}"
    )


def _negative(kind: str, value: str, output: str) -> bool:
    told: Any = json.loads(value)
    match kind:
        case "boolean":
            return told is False
        case "float":
            return bool(told < 0.5)
        case "preference":
            return bool(told.get("rejected") == output)
        case _:
            return bool(str(told).strip() != output.strip())
