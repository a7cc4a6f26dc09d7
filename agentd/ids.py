"""Identifiers and timestamps, the same everywhere."""

import os
import time
from datetime import datetime, timezone


def uuid7() -> str:
    """A time-ordered identifier (RFC 9562, version 7) as 32 hexadecimal digits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (
        (milliseconds & (1 << 48) - 1) << 80 | 7 << 76 | (random >> 62 & 0xFFF) << 64 | 2 << 62 | random & (1 << 62) - 1
    )
    return f"{value:032x}"


def now() -> str:
    """The time as ISO 8601 in UTC with milliseconds, e.g. 2026-01-31T12:00:00.000Z."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def epoch(moment: str) -> float:
    """A `now` in seconds since 1970."""
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()  # noqa: TID251


def seconds_since(moment: str | None) -> float:
    """Seconds from a `now` until now, by the wall clock; 0 for None, and for what lies in the future."""
    return 0.0 if moment is None else max(0.0, time.time() - epoch(moment))
