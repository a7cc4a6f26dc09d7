"""Accuracy over time: what was served, what the model would have said had it not learned, and when it changed."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.drift.camera import Seen

_GREY = "#888888"


@dataclass(frozen=True)
class Point:
    """A window of answers: its middle in seconds, the accuracy served, and that of the model as it was at first."""

    at: float
    served: float
    unadapted: float


def points(seen: Sequence[Seen], unadapted: Sequence[bool], window: int) -> list[Point]:
    """Windows of `window` answers each; one at the end that is not full is left out."""
    curve = []
    for start in range(0, len(seen) - window + 1, window):
        part = seen[start : start + window]
        part_unadapted = unadapted[start : start + window]
        middle = (part[0].at + part[-1].at) / 2
        curve.append(Point(middle, sum(each.right for each in part) / window, sum(part_unadapted) / window))
    return curve


def draw(path: Path, curve: Sequence[Point], turned_at: float, passes: Sequence[dict[str, Any]], title: str) -> None:
    """A PNG or SVG, as the name ends. `passes` have {"began", "at", "outcome", "revision"}. Needs matplotlib."""
    figures = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(
        1, 1, 1, title=title, xlabel="seconds", ylabel="accuracy of the answers, %", ylim=(0, 100)
    )
    times = [point.at for point in curve]
    axes.plot(times, [100 * point.unadapted for point in curve], "--", color=_GREY, label="the model as it was")
    axes.plot(times, [100 * point.served for point in curve], "o-", color="#1f6fb4", label="served")
    axes.axvline(turned_at, color="#b4331f")
    axes.annotate("camera turned", (turned_at, 3), xytext=(4, 0), textcoords="offset points", color="#b4331f")
    for each in passes:
        axes.axvspan(
            each["began"], each["at"], color="#2a8f4a" if each["outcome"] == "committed" else _GREY, alpha=0.15
        )
        if each["outcome"] == "committed":
            axes.annotate(f"r{each['revision']}", (each["at"], 95), ha="right", color="#2a8f4a")
    axes.plot([], [], color="#2a8f4a", alpha=0.3, linewidth=8, label="a pass, committed")
    axes.plot([], [], color=_GREY, alpha=0.3, linewidth=8, label="a pass that was not taken")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
