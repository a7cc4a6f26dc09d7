"""Logging to stderr; where that is the journal, each line with its level in front (sd-daemon(3)).

What clients send is never logged, at any level: neither prompts nor answers, headers or values of feedback.
"""

import logging
import os
import sys
from collections.abc import Mapping

_PRIORITY = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # syslog(3)
_FORMAT = "%(levelname)s %(name)s: %(message)s"


class JournalFormatter(logging.Formatter):
    """`<3>` and so on before every line: the journal takes a line of a traceback for a message of its own."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITY if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


def configure(default: str = "INFO", prefix: str = "", environment: Mapping[str, str] = os.environ) -> None:
    """Sets the root logger up: AGENTD_LOG names the level."""
    level = logging.getLevelName(environment.get("AGENTD_LOG", default).upper())
    handler = logging.StreamHandler(sys.stderr)
    to_journal = stderr_is_journal(environment)
    # The journal has the level as a field of its own.
    form = _FORMAT.removeprefix("%(levelname)s ") if to_journal else _FORMAT
    handler.setFormatter((JournalFormatter if to_journal else logging.Formatter)(prefix + form))
    logging.basicConfig(level=level if isinstance(level, int) else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)


def stderr_is_journal(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether JOURNAL_STREAM (systemd.exec(5)) names what stderr is now: a child may have been given another."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
