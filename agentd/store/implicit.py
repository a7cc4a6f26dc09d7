"""Signs in a request that the answer before it was bad: a tool that refused its call, a question that is asked again.

They are feedback of source `implicit`, and only where `feedback.implicit` says so: whoever asks twice may have had
other reasons. What the environment did wrong (a timeout, no network) is no fault of the answer's and teaches nothing.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from sqlite_utils import Database

from agentd.errors import AgentdError
from agentd.store import feedback, tasks
from agentd.store.feedback import NewFeedback
from agentd.store.inferences import Inference
from agentd.store.normalise import normal_text
from agentd.store.row import select, to_json

_RECENT = 50  # inferences of the same client, among which the answer before is looked for
_ALIKE = 0.6  # of two questions, from 0 to 1; below it the second one is another question
_LEAST, _MOST = (
    12,
    500,
)  # characters of a question that can be asked again; "yes" and "go on" are said twice without being meant so,
# and what is long is a document with a question, and takes long to compare
_LONGEST_ERROR = 10_000  # characters of a tool's result that may say no more than what was wrong
_ENVIRONMENT = re.compile(
    r"time[d -]*out|connect|unreachable|unavailable|offline|network|temporar|try again later|rate.?limit"
    r"|too many requests|\b(?:429|50[0-4])\b|econn|dns|broken pipe|out of memory|disk|cancel",
    re.IGNORECASE,
)
_SAYS_ERROR = re.compile(r"\s*(?:an )?(?:\w+)?(?:error|exception)\b", re.IGNORECASE)


def observe(db: Database, input: dict[str, Any], author: str | None, weights: Mapping[str, float]) -> int:
    """Stores what a new request says about the answers before it; returns how many pieces of feedback that were."""
    messages = input.get("messages") or []
    bad = [*_refused(db, messages, author), *_asked_again(db, messages, author)]
    n = 0
    for inference, sign in bad:
        task = tasks.find(db, inference.task or "default")
        if task is not None and (task.choices or task.open):
            continue  # that one choice is wrong does not make the other one right on such grounds
        new = NewFeedback(
            inference.id,
            "boolean",
            False,
            source="implicit",
            tags={"sign": sign},
            idempotency_key=f"implicit {inference.id}",
            author=author,
        )
        try:
            n += feedback.add(db, new, weights)[1]
        except AgentdError:
            continue  # another sign came before
    return n


def is_error(content: Any) -> bool:
    """Whether a tool's result says that its call was wrong."""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    text = content if isinstance(content, str) else json.dumps(content)
    if len(text) > _LONGEST_ERROR or _ENVIRONMENT.search(text):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _SAYS_ERROR.match(text) is not None
    if not isinstance(value, dict):
        return False
    marks = [value.get(name) for name in ("error", "is_error", "isError", "errors")]
    return any(marks) or value.get("status") == "error"


def _refused(db: Database, messages: list[dict[str, Any]], author: str | None) -> list[tuple[Inference, str]]:
    """Whose calls the results at the end of a conversation say were wrong."""
    wrong = set[str]()
    for message in reversed(messages):
        if message.get("role") != "tool":
            break
        if is_error(message.get("content")):
            wrong.add(str(message.get("tool_call_id")))
    if not wrong:
        return []
    ids = "SELECT json_extract(value, '$.id') FROM json_each(tool_calls)"
    made = f"EXISTS ({ids} INTERSECT SELECT value FROM json_each(?))"
    return [(row, "tool error") for row in _recent(db, author, made, to_json(sorted(wrong)))]


def _asked_again(db: Database, messages: list[dict[str, Any]], author: str | None) -> list[tuple[Inference, str]]:
    """Whose text the last question passes over, being nearly the one before."""
    if [message.get("role") for message in messages[-3:]] != ["user", "assistant", "user"]:
        return []
    first, said, again = (message.get("content") for message in messages[-3:])
    if not (isinstance(first, str) and isinstance(said, str) and isinstance(again, str)):
        return []
    if max(len(first), len(again)) > _MOST:
        return []
    before, now = normal_text(first), normal_text(again)
    if min(len(before), len(now)) < _LEAST:
        return []
    # From 200 characters on all the usual letters would count as junk, and nothing be alike.
    if difflib.SequenceMatcher(None, before, now, autojunk=False).ratio() < _ALIKE:
        return []
    for row in _recent(db, author, "tool_calls = '[]' AND output = ?", said):
        asked = row.input.get("messages") or [{}]
        if asked[-1].get("content") == first:
            return [(row, "asked again")]
    return []


def _recent(db: Database, author: str | None, which: str, value: str) -> list[Inference]:
    """Of the last ones those for which the condition holds, the newest first: only these are read whole."""
    last = "SELECT rowid FROM inferences WHERE author IS ? ORDER BY rowid DESC LIMIT ?"
    return select(db, Inference, f"WHERE rowid IN ({last}) AND {which} ORDER BY rowid DESC", [author, _RECENT, value])
