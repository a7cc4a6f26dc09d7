"""Single keys from a terminal. What is typed ahead counts, and Ctrl-C is what it always is."""

import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def keys() -> Iterator[Callable[[float | None], str]]:
    """A function that waits so many seconds (None: for ever) for a key and returns it: "" for none, "\\x04" at the end
    of the input. The terminal is as it was afterwards."""
    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)
    tty.setcbreak(source, termios.TCSADRAIN)

    def pressed(seconds: float | None) -> str:
        if not select.select([source], [], [], seconds)[0]:
            return ""
        return os.read(source, 1).decode(errors="replace") or "\x04"

    try:
        yield pressed
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
