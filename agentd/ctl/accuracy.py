"""How often answers were right as they were served, over time, with the revisions that gave them as marks."""

from collections.abc import Mapping, Sequence

from agentd.ctl import chart, output
from agentd.ctl.client import JSON

_FEW = 10  # answers of one revision that make a point; fewer days are taken together
_WIDTH, _HEIGHT = 60, 4


def shares(days: Sequence[JSON]) -> list[tuple[int, int, int]]:
    """Points as (revision, answers, right ones): days that follow each other are one point until they have a few
    answers, or the revision changes."""
    points: list[tuple[int, int, int]] = []
    for day in days:
        if points and points[-1][0] == day["revision"] and points[-1][1] < _FEW:
            revision, n, right = points.pop()
            points.append((revision, n + day["n"], right + day["right"]))
        else:
            points.append((day["revision"], day["n"], day["right"]))
    return points


def overall(days: Sequence[JSON]) -> JSON:
    """How many answers were judged, the share of right ones, and that of the revision which answered last."""
    last = [day for day in days if day["revision"] == days[-1]["revision"]]
    return {"answers": sum(day["n"] for day in days), "accuracy": _share(days), "latest": _share(last)}


def _share(days: Sequence[JSON]) -> float | None:
    n = sum(day["n"] for day in days)
    return sum(day["right"] for day in days) / n if n else None


def curve(days: Sequence[JSON]) -> list[str]:
    """Lines of a chart from 0 to 1; under it the revisions, each where its answers begin."""
    points = shares(days)
    lines = chart.line([right / n for _, n, right in points], width=_WIDTH, height=_HEIGHT, low=0.0, high=1.0)
    if not lines:
        return []
    marks = [" "] * (_WIDTH + 8)
    free = 0
    for i, (revision, _, _) in enumerate(points):
        if i and points[i - 1][0] == revision:
            continue
        column, text = i * (_WIDTH - 1) // max(1, len(points) - 1), f"r{revision}"
        if column >= free:  # where they lie too close the first one is named
            marks[column : column + len(text)] = text
            free = column + len(text) + 1
    margin = lines[0].index("┤") + 1
    return [*lines, (" " * margin + "".join(marks)).rstrip()]


def draw(scores: Mapping[str, Sequence[JSON]]) -> None:
    """Prints a chart of every task, on a terminal."""
    for task, days in scores.items():
        if not days:
            continue
        n, span = sum(day["n"] for day in days), dict.fromkeys((days[0]["day"], days[-1]["day"]))
        print(f"\n{output.clean(task, lines=False)}: right answers of {n} that were judged, {' to '.join(span)}")
        for line in curve(days):
            print(line)
