"""What this board does in a fleet: with whom, what has left it, and what came in."""

from typing import Any

from agentd.ctl import output
from agentd.ctl.client import Daemon
from agentd.ctl.options import Json, Socket
from agentd.ctl.output import Column

_ROUNDS = [
    Column("created", "created_at"),
    Column("run", "run"),
    Column("round", "number", right=True),
    Column("action", "action"),
    Column("state", "state"),
    Column("kind", "kind"),
    Column("out", "bytes_out", right=True),
    Column("in", "bytes_in", right=True),
    Column("to", "peer"),
    Column("pass", "pass_id", right=True),
    Column("revision", "revision", right=True),
    Column("reason", "reason", wide=True),
]


def fleet(as_json: Json = False, socket: Socket = None) -> None:
    """Who this board learns together with, what may leave it, and what has."""
    answer = Daemon(socket).get("/admin/fleet")
    if as_json:
        output.document(answer)
        return
    rounds = answer.pop("rounds")
    if output.on_terminal():
        output.facts(_for_people(answer))
        print()
        output.listing(rounds, _ROUNDS, empty="no rounds yet")
    else:
        output.listing(rounds, _ROUNDS)


def _for_people(answer: dict[str, Any]) -> dict[str, Any]:
    """With words where there is nothing."""
    name = answer["name"] or "none (fleet.name)"
    send = ", ".join(answer["send"]) or "nothing (fleet.send)"
    epsilon = answer["epsilon"]
    if not answer["contributions"]:
        private = "nothing was sent"
    elif epsilon is None:
        private = "no guarantee: what was sent had no noise (fleet.noise)"
    else:
        private = f"ε = {epsilon:.3g} at delta = {answer['delta']:g}"
    shown = {"fleet": name, "may leave": send, "privacy": private, "not now": answer["waits_for"]}
    return shown | {key: answer[key] for key in ("contributions", "bytes_out", "bytes_in", "base_sha256", "engine")}
