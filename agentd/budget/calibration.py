"""What earlier passes took against what was predicted for them: one bounded factor per process and plan family.

The footprint's formulas hold for every machine; allocators, thread pools and library versions differ a little. The
factor is the largest ratio of the last passes rather than their mean, because a prediction that is exceeded half of the
time is no use: it stays above every peak that was seen, and comes down when passes keep taking less.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LOWEST, HIGHEST = 0.8, 1.5
"""A factor outside would be a fault in the formulas or the measurement, and hide it."""

MARGIN = 1.02  # peaks of the same plan differ by one or two percent from pass to pass
WINDOW = 8  # passes that count, the newest
TERM = "calibration"


@dataclass(frozen=True)
class Measured:
    """A process's part in an earlier pass, in bytes: `predicted` by the formulas alone, `peak` as it was measured.

    For the engine both are what the pass added to serving.
    """

    process: str
    family: str
    predicted: int
    peak: int


@dataclass(frozen=True)
class Factor:
    """What to multiply a process's terms with. `passes` is the number of passes it rests on."""

    process: str
    family: str
    factor: float
    passes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "process": self.process,
            "family": self.family,
            "factor": round(self.factor, 4),
            "passes": self.passes,
            "bounds": [LOWEST, HIGHEST],
        }


def family(method: str, blocks: int, checkpoint: bool = False) -> str:
    """Plans whose predictions err together: the dial's setting changes sizes, checkpointing changes what is kept."""
    if method == "mezo" or blocks == 0:
        return "forward passes only"
    return "backpropagation, one block at a time" if checkpoint else "backpropagation"


def measured(
    method: str, blocks: int, checkpoint: bool, predicted: Mapping[str, int], peaks: Mapping[str, int]
) -> list[Measured]:
    """The measurements of one pass: `predicted` by "process: term", `peaks` by process, both as it recorded them."""
    sums: dict[str, int] = {}
    for name, size in predicted.items():
        process, _, term = name.partition(": ")
        if term != TERM:  # an earlier factor must not count twice
            sums[process] = sums.get(process, 0) + size
    name = family(method, blocks, checkpoint)
    return [
        Measured(process, name, size, peaks[process])
        for process, size in sums.items()
        if size > 0 and peaks.get(process, 0) > 0
    ]


def factors(history: Iterable[Measured]) -> dict[tuple[str, str], Factor]:
    """A factor per (process, family) from measurements, the newest first. Without any there is none."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for each in history:
        ratio = each.peak / each.predicted if each.predicted > 0 else math.nan
        seen = ratios.setdefault((each.process, each.family), [])
        if math.isfinite(ratio) and len(seen) < WINDOW:
            seen.append(ratio)
    return {
        key: Factor(*key, min(HIGHEST, max(LOWEST, MARGIN * max(seen))), len(seen))
        for key, seen in ratios.items()
        if seen
    }
