"""Does a revision on trial get more negative feedback than the one before? A sequential probability ratio test, which
may be looked at as often as one likes (Wald 1945): the chance that it speaks up against a revision that is no worse is
at most alpha."""

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
    """Per answer, by the latest accepted feedback that judges it. A comment judges nothing, and what an episode came to
    is no verdict on any one answer."""
    rows = db.execute(
        "SELECT feedback.kind, feedback.value, inferences.output, inferences.tool_calls FROM feedback"
        " JOIN inferences ON inferences.id = inference_id"
        " WHERE inferences.revision = ? AND state IN ('accepted', 'duplicate') AND feedback.kind != 'comment'"
        " AND feedback.rowid = (SELECT max(rowid) FROM feedback AS f WHERE f.inference_id = inferences.id"
        " AND f.kind != 'comment' AND f.part_of IS NULL AND f.state IN ('accepted', 'duplicate'))"
        " ORDER BY feedback.rowid DESC LIMIT ?",
        [revision, limit],
    )
    verdicts = [_negative(kind, json.loads(value), output, json.loads(calls)) for kind, value, output, calls in rows]
    return Rate(sum(verdicts), len(verdicts))


def more_negative(trial: Rate, committed: Rate, alpha: float) -> str | None:
    """What is wrong, or None. The alternative is half-way between the committed revision's rate of negative feedback
    and 1; without any earlier feedback half of the answers may be bad."""
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


def _negative(kind: str, judged: Any, output: str, calls: list[Any]) -> bool:
    match kind:
        case "boolean":
            return judged is False
        case "float":
            return bool(judged < 0.5)
        case "preference":
            return _same(judged.get("rejected"), output, calls)
        case _:
            return not _same(judged, output, calls)


def _same(said: Any, output: str, calls: list[Any]) -> bool:
    """Whether a text or a message is the answer that was given."""
    if not isinstance(said, dict):
        return not calls and str(said).strip() == output.strip()
    if not (said.get("tool_calls") or calls):
        return bool((said.get("content") or "").strip() == output.strip())
    return _called(said.get("tool_calls") or []) == _called(calls)


def _called(calls: list[Any]) -> list[Any]:
    """Names and arguments, whatever their ids and the blanks in their JSON. An answer that was cut off has arguments
    that are none."""
    return [(call["function"]["name"], _parsed(call["function"]["arguments"])) for call in calls]


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
