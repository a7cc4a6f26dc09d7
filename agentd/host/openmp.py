"""How long threads of OpenMP spin before they sleep: whichever of long and short makes tokens faster now.

A token takes hundreds of barriers. A thread that sleeps at one takes long to wake, all the more while the daemon runs
in between; but one that spins takes the core from whoever it waits for, where others want the cores. GNU's OpenMP takes
the length from the environment, once. It has a second, short one besides, for a process with more threads in its teams
than it may use cores: a team that does nothing, in a thread of its own, makes it choose that one.
"""

import contextlib
import ctypes
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

_MOST = 64  # threads of a team that does nothing
# Of GOMP_SPINCOUNT: long enough for what is done between two tokens, some milliseconds; and what does little harm.
_LONG, _SHORT = 50000, 500
_ROWS = 16  # of a decode that makes tokens; a prompt's takes its time whoever waits for whom
_SAMPLES = 12  # decodes by which the two are compared
_BETTER = 0.95  # times as long is faster
_CROWDED, _IN_A_ROW = 3.0, 3  # so many decodes that take so many times as long: others have come
_SOON, _LATER = 1.0, 30.0  # seconds of decoding between two comparisons, at first and at most


def spin_count(threads: int) -> int:
    """What a process that computes with so many threads, which a `Spinning` watches, is to have as GOMP_SPINCOUNT.

    Measured on two cores, milliseconds a token, alone and beside two busy processes: sleeping at every barrier 22.7 and
    11; spinning 300 times 6.1, 1000 times 6.1 and 17; 10000 times 6.0 and over 250, because a thread spins while the
    one it waits for has no core. With daemon and client between tokens, and others that get a tenth of the time:
    spinning 500 times 19, 5000 times 16, 50000 times 13.
    """
    return _LONG if _idle_threads(threads) else _SHORT


def _idle_threads(threads: int, cores: int | None = None) -> int:
    """Of a team with which a process has more than it has cores; 0 where that is not to be done."""
    n = (cores or len(os.sched_getaffinity(0))) - threads + 2
    return n if threads > 1 and 2 <= n <= _MOST else 0


class Spinning:
    """Told of every decode by the thread that computes with `threads`; it begins with what does no harm."""

    def __init__(self, threads: int, cores: int | None = None) -> None:
        n = _idle_threads(threads, cores)
        self._team = Team(n) if n else None
        self._rows = 0
        self._recent: deque[float] = deque(maxlen=_SAMPLES)  # seconds of decodes as it is now
        self._trial: list[float] | None = None  # those of the other way, while it is tried
        self._usual = 0.0  # seconds of a decode, against which a trial stands, or with which long spinning was chosen
        self._since, self._interval = 0.0, _SOON
        self._paused = False  # it spins briefly for background work
        if self._team is not None:
            self._team.begin()

    @property
    def short(self) -> bool:
        return self._team is not None and self._team.running

    def begin(self, *, serving: bool) -> None:
        """A decode is about to begin. Of background work no one measures tokens, and others compute beside it: it
        spins briefly, and serving goes on as it was."""
        if self._team is None:
            return
        if not serving and not self.short:
            self._team.begin()
            self._paused = True
        elif serving and self._paused:
            self._team.end()
            self._paused = False

    def decoded(self, rows: int, seconds: float) -> None:
        """A decode of so many tokens took so long. Every now and then the other way is tried for a few of them."""
        if self._team is None or rows > _ROWS:
            return
        if rows != self._rows:  # not to be compared
            if self._trial is not None:
                self._turn()
            self._rows, self._trial, self._usual = rows, None, 0.0
            self._recent.clear()
            return
        if self._trial is not None:
            self._try(self._trial, seconds)
            return
        self._since += seconds
        self._recent.append(seconds)
        last = list(self._recent)[-_IN_A_ROW:]
        if not self.short and self._usual and len(last) == _IN_A_ROW and min(last) > _CROWDED * self._usual:
            self._turn()
            self._recent.clear()
            self._since, self._interval = 0.0, _SOON
        elif self._since >= self._interval and len(self._recent) == _SAMPLES:
            self._usual, self._trial = sum(self._recent) / _SAMPLES, []
            self._turn()

    def _try(self, trial: list[float], seconds: float) -> None:
        trial.append(seconds)
        budget = _BETTER * _SAMPLES * self._usual
        if sum(trial) <= budget and len(trial) < _SAMPLES:
            return
        if sum(trial) <= budget:
            self._usual, self._interval = sum(trial) / _SAMPLES, _SOON
        else:
            self._turn()
            self._interval = min(2 * self._interval, _LATER)
        self._trial, self._since = None, 0.0
        self._recent.clear()

    def _turn(self) -> None:
        assert self._team is not None
        if self._team.running:
            self._team.end()
        else:
            self._team.begin()

    def close(self) -> None:
        if self._team is not None:
            self._team.end()


class Team:
    """`n` threads of GNU's OpenMP that do nothing but be there."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._library: Any = None
        with contextlib.suppress(OSError, StopIteration):  # OpenMP is not GNU's
            lines = Path("/proc/self/maps").read_text().splitlines()
            loaded = next(line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line)
            self._library = ctypes.CDLL(loaded, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        self._over: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._over is not None

    def begin(self) -> None:
        if self._library is None or self.running:
            return
        over, there = threading.Event(), threading.Event()
        nothing = ctypes.cast(self._library.omp_get_level, ctypes.c_void_p)

        def hold() -> None:
            self._library.GOMP_parallel(nothing, None, ctypes.c_uint(self._n), ctypes.c_uint(0))
            there.set()
            over.wait()  # the team ends with this thread

        self._thread = threading.Thread(target=hold, name="openmp team", daemon=True)
        self._thread.start()
        there.wait()
        self._over = over

    def end(self) -> None:
        if self._over is not None and self._thread is not None:
            self._over.set()
            self._thread.join()
            self._over = self._thread = None
