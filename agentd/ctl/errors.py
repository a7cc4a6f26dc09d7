"""How agentctl fails: one exit code per thing a script would want to tell apart, one line on stderr for a person."""

from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Exit codes, as `agentctl --help` documents them."""

    OK = 0
    ERROR = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    NOT_COMMITTED = 6
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.ERROR: "the daemon, or agentctl itself, reported an error",
    ExitCode.USAGE: "wrong usage: unknown command, option or value",
    ExitCode.UNREACHABLE: "the daemon is not reachable",
    ExitCode.NOT_FOUND: "the thing asked for does not exist",
    ExitCode.REFUSED: "refused, or in conflict with what runs already",
    ExitCode.NOT_COMMITTED: "the pass ended without a committed revision",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}


class CtlError(Exception):
    """An error that the user sees as one line on stderr."""

    exit_code = ExitCode.ERROR


class UsageError(CtlError):
    exit_code = ExitCode.USAGE


class NotReachable(CtlError):
    """The socket cannot be connected to, or the daemon hung up before it answered."""

    exit_code = ExitCode.UNREACHABLE

    def __init__(self, socket: Path, reason: str, advice: str) -> None:
        super().__init__(f"no daemon at {socket}: {reason}; {advice}")
        self.reason = reason
        self.advice = advice


class ApiError(CtlError):
    """The daemon's own error answer. `status` is the HTTP status, `code` the daemon's name for the failure."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.exit_code = {404: ExitCode.NOT_FOUND, 409: ExitCode.REFUSED}.get(status, ExitCode.ERROR)
