"""What a board does in a round, step by step, whatever happens to its daemon meanwhile. Knows nothing of Flower.

The daemon remembers rounds: asked again it gives what it has recorded, so everything here may be repeated. A daemon
that is down, busy or held is asked again until `patience` is over. Answers are codes, not sentences: a daemon's reasons
name tasks and sensors, which are its owner's.
"""

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from agentd_flower.board import JSON, Refused, Unreachable

DONE, NOT_NOW, UNREACHABLE = "done", "not_now", "unreachable"
_SAID = frozenset({"other_base", "no_consent"})  # codes whose messages name digests, engines and the fleet alone
_LATER = frozenset({"not_now", "engine_unavailable", "engine_died", "overloaded"})
_AGAIN = "the daemon stopped"  # how the reason of a pass begins that a restart cut short
_TIRED = frozenset({"failed", "refused"})


class Daemon(Protocol):
    def get(self, path: str) -> JSON: ...
    def post(self, path: str, body: JSON) -> JSON: ...
    def download(self, path: str) -> bytes: ...


@dataclass(frozen=True)
class Clock:
    """`look` is how many seconds lie between two looks at a pass."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    look: float = 1.0


CLOCK = Clock()


@dataclass(frozen=True)
class Outcome:
    """`status` is DONE, or the code of why not, `message` a sentence where it is no one's secret."""

    status: str
    message: str = ""
    facts: JSON | None = None
    data: bytes = b""


def query(board: Daemon, fleet: str) -> Outcome:
    """What the board learns on, told to the fleet that its owner has agreed to and to no other."""
    try:
        facts = board.get("/admin/fleet")
    except Unreachable:
        return Outcome(UNREACHABLE)
    except Refused as error:
        return Outcome(error.code)
    if facts["name"] != fleet:
        return Outcome("no_consent", f"this board's owner has not put {fleet!r} into fleet.name")
    kinds = [kind for kind in facts["can_send"] if kind in facts["send"]]
    names = ("engine", "base_sha256", "dtype")
    return Outcome(DONE, facts={"kinds": kinds, **{name: facts[name] or "" for name in names}})


def train(board: Daemon, order: JSON, data: bytes, patience: float, clock: Clock = CLOCK) -> Outcome:
    """Learns for a round: the contribution, with its kind and how many examples it is from (None: not told). `data` is
    the fleet's file, or nothing where the board has it already."""
    body = {**order, **({"data": _text(data)} if data else {})}
    row = _carried_out(board, "train", body, patience, clock)
    if isinstance(row, Outcome):
        return row
    try:
        made = board.download(f"/admin/fleet/rounds/{order['run']}/{order['number']}/result")
    except Unreachable:
        return Outcome(UNREACHABLE)
    except Refused as error:
        return Outcome(error.code)
    return Outcome(DONE, facts={"kind": row["kind"], "examples": row["examples"]}, data=made)


def take(board: Daemon, order: JSON, data: bytes, patience: float, clock: Clock = CLOCK) -> Outcome:
    """Takes the fleet's file in, as a candidate; what the board tells of it."""
    row = _carried_out(board, "take", {**order, "data": _text(data)}, patience, clock)
    if isinstance(row, Outcome):
        return row
    try:
        return Outcome(DONE, facts=board.get(f"/admin/fleet/rounds/{order['run']}/{order['number']}/figures"))
    except Unreachable:
        return Outcome(UNREACHABLE)
    except Refused as error:
        return Outcome(error.code)


def _carried_out(board: Daemon, action: str, body: JSON, patience: float, clock: Clock) -> JSON | Outcome:
    """The action's row once its pass is over, or why there is none."""
    until = clock.now() + patience
    tried = 0
    why = Outcome(UNREACHABLE)
    while tried == 0 or clock.now() < until:
        tried += 1
        try:
            row = board.post(f"/admin/fleet/{action}", body)
            while not row["done"]:
                clock.sleep(clock.look)
                row = _row(board, action, body)
        except Unreachable:
            why = Outcome(UNREACHABLE)
        except Refused as error:
            if error.code not in _LATER:
                return Outcome(error.code, str(error) if error.code in _SAID else "")
            why = Outcome(NOT_NOW)
        else:
            if row["state"] not in _TIRED:
                return row
            if row["state"] == "failed" and not str(row["reason"]).startswith(_AGAIN):
                return Outcome("failed")
            why = Outcome(str(row["state"]))
            if row["state"] == "refused":  # there is no memory for it, or nothing to learn from
                return why
        clock.sleep(min(5.0, 1.0 * tried) * clock.look)
    return why


def _row(board: Daemon, action: str, body: JSON) -> JSON:
    row: Any = board.get(f"/admin/fleet/rounds/{body['run']}/{body['number']}")[action]
    if not isinstance(row, dict):
        raise Unreachable("the daemon knows nothing of the round any more")
    return row


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
