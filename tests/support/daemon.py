"""One daemon for all tests that only talk to it."""

import atexit
import functools
from pathlib import Path

from tools.daemon import Answer, DaemonProcess, UnixConnection, eventually, exchange, streaming

__all__ = ["Answer", "DaemonProcess", "UnixConnection", "eventually", "exchange", "shared", "streaming"]


@functools.cache
def shared(model: Path) -> DaemonProcess:
    """It lives until the end of the session."""
    daemon = DaemonProcess(model)
    atexit.register(daemon.close)
    return daemon.start()
