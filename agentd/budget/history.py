"""What the records of earlier passes say about the plans of the next one. Takes rows as `Pass.as_json()` gives them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from agentd.budget.calibration import Factor, Measured, factors, measured
from agentd.budget.expectation import PastPass

Row = Mapping[str, Any]


def calibration(rows: Iterable[Row]) -> dict[tuple[str, str], Factor]:
    """The factors that the rows, the newest first, give. Passes that ended before their peak are left out."""
    measurements: list[Measured] = []
    for row in rows:
        if row["state"] in ("committed", "rejected", "rolled_back") and row["predicted"] and row["method"]:
            checkpoint = bool(row["plan"].get("checkpoint"))
            measurements += measured(
                row["method"], row["blocks"] or 0, checkpoint, row["predicted"], _added(row["peaks"])
            )
    return factors(measurements)


def _added(peaks: Mapping[str, int]) -> dict[str, int]:
    """Bytes by process beyond serving. The trainer is all new; of the others it must be known what they had before."""
    added = {"trainer": peaks["trainer"]} if "trainer" in peaks else {}
    for process in ("engine", "daemon"):
        before = peaks.get(f"{process}_before")
        if process in peaks and before is not None:
            added[process] = peaks[process] - before
    return added


def outcomes(rows: Iterable[Row]) -> list[PastPass]:
    """What the rows' passes gained; a rejected or rolled back one gained nothing."""
    past = []
    for row in rows:
        if row["state"] not in ("committed", "rejected", "rolled_back") or not row["method"]:
            continue
        gained = _gain(row["gate"].get("tasks", {})) if row["state"] == "committed" else 0.0
        seconds = math.fsum(row["phases"].values())
        if gained is not None and seconds > 0:
            plan = row["plan"]
            past.append(
                PastPass(
                    row["method"],
                    row["blocks"] or 0,
                    gained,
                    seconds,
                    checkpoint=bool(plan.get("checkpoint")),
                    micro_tokens=int(plan.get("micro_tokens") or 0),
                    streamed=bool(plan.get("streamed")),
                    computes_trunk=bool(plan.get("computes_trunk")),
                    texts=bool(plan.get("texts")),
                    computed=float(plan.get("computed_seconds") or 0.0),
                )
            )
    return past


def _gain(tasks: Mapping[str, Any]) -> float | None:
    """The mean over the adapted tasks of the share of right answers gained, or of the loss taken away."""
    gains = []
    for figures in tasks.values():
        before, after = figures["before"], figures["after"]
        if not figures.get("adapted", True):
            continue
        if before.get("accuracy") is not None and after.get("accuracy") is not None:
            gains.append(after["accuracy"] - before["accuracy"])
        elif before.get("loss") and after.get("loss") is not None:
            gains.append((before["loss"] - after["loss"]) / before["loss"])
    return math.fsum(gains) / len(gains) if gains else None
