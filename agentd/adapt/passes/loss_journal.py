"""What the engine has said of a zeroth-order run, in a file that outlives a restart.

A run knows nothing else: directions are made again from seeds that count up, and step sizes, clipping and the best
point come of the losses. One that begins anew and is told the same losses again takes the same steps, without a forward
pass.
"""

import contextlib
import logging
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentd.formats.training_state import StateSection, TrainingState, write

logger = logging.getLogger(__name__)

_EVERY = 45.0  # seconds between two times that it is written
_LOSSES = "losses"


class LossJournal:
    """`header` is what its file begins with; a file whose `belongs` differs is of another run."""

    def __init__(self, path: Path, header: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._header, self._clock = path, header, clock
        self._losses = array("d")
        self._told = 0
        self._saved = clock()
        with contextlib.suppress(OSError, ValueError):
            state = TrainingState.read(path)
            if state.header["belongs"] == header["belongs"]:
                self._losses.frombytes(bytes(state.places[_LOSSES][1]))
                state.read_into(_LOSSES, memoryview(self._losses).cast("B"))

    def tell(self, measure: Callable[[], float]) -> float:
        """The next loss: as it was the last time, or measured now."""
        if self._told == len(self._losses):
            self._losses.append(measure())
            if self._clock() - self._saved >= _EVERY:
                self.save()
        self._told += 1
        return self._losses[self._told - 1]

    def save(self) -> None:
        self._saved = self._clock()
        known = self._losses.tobytes()
        try:
            write(self._path, self._header, [StateSection(_LOSSES, len(known), [known])])
        except OSError as error:  # a restart would lose more; nothing else depends on it
            logger.warning("%s: %s", self._path, error)
