"""What `continual` measured, as Markdown and as a picture."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

_Row = Mapping[str, Any]
_TEN = 10  # days whose mean is looked at


def table(rows: Sequence[_Row]) -> str:
    """A table for each part that was run; what was not run is not there."""
    parts = (("first", _first), ("tasks", _tasks), ("days", _days))
    mine = ((report, [row for row in rows if row["part"] == name]) for name, report in parts)
    return "\n\n".join("\n".join(report(some)) for report, some in mine if some)


def _first(rows: Sequence[_Row]) -> list[str]:
    columns = list(dict.fromkeys(row["column"] for row in rows))
    lines = [f"| task | corrections | {' | '.join(columns)} |", f"|---|--:|{'--:|' * len(columns)}"]
    for task, size in dict.fromkeys((row["task"], row["corrections"]) for row in rows):
        cells = []
        for column in columns:
            some = [r for r in rows if (r["task"], r["corrections"], r["column"]) == (task, size, column)]
            if not some:
                cells.append("–")
                continue
            cells.append(
                f"{_percent(r['right'] for r in some)}, {fmean(r['ms'] for r in some):.0f} ms" if some else "–"
            )
        lines.append(f"| {task} | {size} | {' | '.join(cells)} |")
    return lines


def _tasks(rows: Sequence[_Row]) -> list[str]:
    """Backward transfer: how much a task is better at the end than right after it was learned (Lopez-Paz & Ranzato
    2017)."""
    lines = ["| order | seed | average at the end | backward transfer |", "|---|--:|--:|--:|"]
    runs: dict[tuple[str, int], list[_Row]] = defaultdict(list)
    for row in rows:
        order = row["order"] if isinstance(row["order"], str) else " → ".join(row["order"])
        runs[order, row["seed"]].append(row)
    for (order, seed), run in runs.items():
        final = run[-1]["right"]
        at_once = {row["after"]: row["right"][row["after"]] for row in run if row["after"] in row["right"]}
        earlier = [final[name] - right for name, right in at_once.items() if name != run[-1]["after"]]
        transfer = f"{100 * fmean(earlier):+.1f} points" if earlier else "–"
        lines.append(f"| {order} | {seed} | {_percent(final.values())} | {transfer} |")
    return lines


def _days(rows: Sequence[_Row]) -> list[str]:
    lines = ["| task | first ten days | last ten days | best ten days |", "|---|--:|--:|--:|"]
    for name in dict.fromkeys(name for row in rows for name in row["right"]):
        shares = [fmean(day["right"][name] for day in some) for some in _by_day(rows) if name in some[0]["right"]]
        means = [fmean(shares[i : i + _TEN]) for i in range(max(1, len(shares) - _TEN + 1))]
        lines.append(f"| {name} | {means[0]:.1%} | {means[-1]:.1%} | {max(means):.1%} |")
    passes = [each["state"] for row in rows for each in row["night"]["passes"]]
    counts = ", ".join(f"{passes.count(state)} {state}" for state in sorted(set(passes))) or "none"
    longest = max(row["night"]["seconds"] for row in rows)
    memory, disk = ([row[name] / 1e6 for row in rows] for name in ("memory_bytes", "disk_bytes"))
    return [
        *lines,
        "",
        f"Passes: {counts}. Longest night: {longest:.0f} s. Memory at night's end: {min(memory):.0f} to "
        f"{max(memory):.0f} MB. Disk: {disk[0]:.1f} MB after the first day, {disk[-1]:.1f} MB after the last.",
    ]


def _by_day(rows: Sequence[_Row]) -> list[list[_Row]]:
    by_day: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        by_day[row["day"]].append(row)
    return [by_day[day] for day in sorted(by_day)]


def _percent(shares: Iterable[float]) -> str:
    return f"{100 * fmean(shares):.1f} %"


def plot(rows: Sequence[_Row], path: Path) -> None:
    """A panel for each part that was run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = {"first": _plot_first, "tasks": _plot_tasks, "days": _plot_days}
    present = [name for name in panels if any(row["part"] == name for row in rows)]
    figure, axes = pyplot.subplots(len(present), 1, figsize=(8, 4 * len(present)), squeeze=False)
    for (axis,), name in zip(axes, present, strict=True):
        panels[name](axis, [row for row in rows if row["part"] == name])
        axis.set_ylabel("right answers in %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _plot_first(axis: Any, rows: Sequence[_Row]) -> None:
    for task, column in dict.fromkeys((row["task"], row["column"]) for row in rows):
        some = [row for row in rows if (row["task"], row["column"]) == (task, column)]
        sizes = sorted({row["corrections"] for row in some})
        shares = [100 * fmean(row["right"] for row in some if row["corrections"] == size) for size in sizes]
        axis.plot(sizes, shares, "o-", label=f"{task}: {column}")
    axis.set_xscale("log")
    axis.set_xlabel("corrections")


def _plot_tasks(axis: Any, rows: Sequence[_Row]) -> None:
    run = [row for row in rows if row["order"] == rows[0]["order"] and row["seed"] == rows[0]["seed"]]
    for name in rows[0]["right"]:
        axis.plot(range(len(run)), [100 * row["right"][name] for row in run], "o-", label=name)
    axis.set_xticks(range(len(run)), [row["after"] or "base" for row in run])
    axis.set_xlabel("after")


def _plot_days(axis: Any, rows: Sequence[_Row]) -> None:
    days = _by_day(rows)
    for name in dict.fromkeys(name for row in rows for name in row["right"]):
        there = [
            (some[0]["day"], fmean(row["right"][name] for row in some)) for some in days if name in some[0]["right"]
        ]
        means = [fmean(share for _, share in there[max(0, i - 6) : i + 1]) for i in range(len(there))]
        axis.plot([day for day, _ in there], [100 * mean for mean in means], label=f"{name}, mean of seven days")
    for row in rows:
        if any(each["state"] == "committed" for each in row["night"]["passes"]):
            axis.axvline(row["day"], color="grey", linestyle=":", linewidth=0.7)
    axis.axvline(rows[0]["drift"], color="red", linestyle="--", linewidth=1)
    axis.set_xlabel("day (dotted: a pass was committed; red: labels change their meaning)")
