"""Messages between the daemon and its engine: one JSON object a line over a socket pair.

To the engine: {"id": n, "op": name, ...arguments}. From it, any number of {"id": n, "progress": value} and one of
{"id": n, "result": value} or {"id": n, "error": {...}}; and {"pieces": [...]} for requests being served.
"""

import json
from typing import Any

from agentd import errors
from agentd.errors import AgentdError

LIMIT = 1 << 28  # bytes of one message


def pack(message: dict[str, Any]) -> bytes:
    # A lone surrogate in a request must reach whoever refuses it; json.loads takes it back from bytes like these.
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as data."""
    if isinstance(error, AgentdError):
        known = {"class": type(error).__name__, "type": error.type, "code": error.code, "status": error.status}
        return {"message": str(error), "param": getattr(error, "param", None), **known}
    return {"message": f"{type(error).__name__}: {error}", "class": "AgentdError"}


def revive(described: dict[str, Any]) -> AgentdError:
    """The exception that `describe` described, as far as the daemon's handlers tell them apart."""
    cls = getattr(errors, str(described.get("class")), AgentdError)
    if not (isinstance(cls, type) and issubclass(cls, AgentdError)):
        cls = AgentdError
    error: AgentdError = cls.__new__(cls)
    Exception.__init__(error, described["message"])
    for name in ("type", "code", "status", "param"):
        if described.get(name) is not None:
            setattr(error, name, described[name])
    return error
