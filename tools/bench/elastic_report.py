"""The table and the picture of what `elastic` measured.

    python -m tools.bench elastic-report RESULTS.jsonl [--plot FILE.png]

A row is the mean over seeds with its spread (largest minus smallest); ratios are taken between runs of the same task
and seed, which ran one after the other: to PEFT's in float32, of a grid to the most accurate one.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

Row = dict[str, Any]
BASELINE = "peft-fp32"
_COLORS, _MARKERS = [*(f"C{i}" for i in range(10)), "black", "teal"], "osD^vP*Xhp<>"
_LABELS = {
    "default": "agentd, what it takes with 1 GB free",
    "blockwise-bp, k = 30": "agentd, BP in all blocks, one in memory",
    "calibration": "label bias calibrated away",
    "peft-fp32, k = 30": "PEFT LoRA, float32",
    "peft-bf16, k = 30": "PEFT LoRA, bfloat16",
}


def table(rows: list[Row]) -> str:
    """Markdown: per task and method accuracy, loss, seconds, peak, and the last two as ratios to PEFT's."""
    lines = [
        "| task | method | seeds | accuracy | spread | held-out loss | seconds | peak | time / PEFT | memory / PEFT |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (task, name), group in grouped(rows).items():
        accuracies = [row["accuracy"] for row in group]
        grid = sorted((row for row in rows if row["task"] == task and row["method"] == BASELINE), key=_accuracy)
        base = {row["seed"]: row for row in grid}
        pairs = [(row, base[row["seed"]]) for row in group if row["seed"] in base and row.get("peak_bytes")]
        ratios = [
            f"{mean(row[key] / other[key] for row, other in pairs):.2f}" if pairs else ""
            for key in ("seconds", "peak_bytes")
        ]
        peak = mean(row.get("peak_bytes", 0) for row in group) / 1e6
        lines.append(
            f"| {task} | {name} | {len(group)} | {mean(accuracies):.1%} | {max(accuracies) - min(accuracies):.1%} | "
            f"{mean(row['loss'] for row in group):.3f} | {mean(row['seconds'] for row in group):.0f} | "
            f"{f'{peak:.0f} MB' if peak else ''} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines)


def grouped(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        k = f", k = {row['blocks']}" if row["blocks"] else ""
        how = f", lr {row['lr']:g}, epochs {row['epochs']}" if row.get("lr") else ""
        groups[row["task"], row["method"] + k + how].append(row)
    return dict(groups)


def _accuracy(row: Row) -> float:
    accuracy: float = row["accuracy"]
    return accuracy


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy against seconds and against peak memory, a panel of each per task: a run is a small mark, the mean over
    seeds a large one, the base model a dashed line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    tasks = sorted({row["task"] for row in rows})
    names = dict.fromkeys(name for _, name in grouped(rows))
    style = {name: (_COLORS[i % 12], _MARKERS[i % 12]) for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(11, 4 * len(tasks)), squeeze=False, sharey="row")
    for line, task in zip(axes, tasks, strict=True):
        for panel, key, scale in ((line[0], "seconds", 1.0), (line[1], "peak_bytes", 1e-6)):
            for (of, name), group in grouped(rows).items():
                accuracies = [100 * row["accuracy"] for row in group]
                if of == task and name == "none":
                    panel.axhline(mean(accuracies), color="grey", linestyle="--", linewidth=1, label="base model")
                elif of == task and group[0].get("peak_bytes"):
                    color, marker = style[name]
                    x = [scale * row[key] for row in group]
                    panel.plot(x, accuracies, marker, color=color, alpha=0.45, markersize=5)
                    label = _LABELS.get(name, name)
                    panel.plot(mean(x), mean(accuracies), marker, color=color, markersize=11, label=label)
            panel.grid(alpha=0.3, which="both")
        line[0].set_xscale("log")
        line[0].set_xticks([30, 60, 120, 240, 480], ["30", "60", "120", "240", "480"])
        line[0].set_xticks([], minor=True)
        line[1].set_xlim(left=0)
        line[0].set_ylabel(f"{task}: accuracy in %")
    axes[-1][0].set_xlabel("seconds to learn")
    axes[-1][1].set_xlabel("peak memory of all processes, MB")
    axes[0][1].legend(fontsize=7, loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Reports what `elastic` measured.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
