"""The paper's methods on the weights themselves, compared: Fig. 4 of Katti et al. 2025 on movie reviews, and its parts.

    python -m tools.bench_methods step MODEL                        MeZO's step against two forwards, and as published
    python -m tools.bench_methods gradient MODEL                    SPSA's projected gradient against autograd's
    python -m tools.bench_methods memory MODEL                      peak of every method beside that of serving
    python -m tools.bench_methods accuracy MODEL --output FILE      accuracy against time and memory, a process a run
    python -m tools.bench_methods report FILE [FILE ...] [--plot PNG]

MODEL is a GGUF file or a directory of transformers. What FILE holds is not run again, so that a comparison can be made
run by run; --until S begins nothing that would end later than S seconds from now, and a run that does not fit is put
aside beside FILE and taken up by the next call. A method is NAME, or NAME@STEPS where --steps is too many or too few
for the time it has. Methods take turns within a seed. A second FILE, of another model, is a second panel: give the
larger model MeZO and the smaller one BP for a comparison at equal memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from agentd.learn.legs import DISTRIBUTIONS
from tools.bench_methods_learners import WHOLE
from tools.bench_methods_step import EPSILONS, gradient_errors, step_times

METHODS = "bp,lora,elasticzo:1,elasticzo:4,mezo:1,mezo:5,bp-checkpointed,elasticzo:8,suffix:1,sparse-mezo,mezo-lora"
MEMORY = "none,mezo:1,mezo:5,elasticzo:1,elasticzo:4,elasticzo:8,bp-checkpointed,bp,lora,mezo-lora,loho:4,adazeta"
_OVERHEAD = 60.0  # seconds of a run beside its training: loading and judging
_SHORTEST = 20.0  # seconds of training that are worth a process

Row = dict[str, Any]


def run(model: Path, method: str, *arguments: str) -> Row:
    command = [sys.executable, "-m", "tools.bench_methods_learners", str(model), method, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}: {done.stderr[-2000:]}")
    result: Row = json.loads(done.stdout.splitlines()[-1])
    return result


def steps_of(options: argparse.Namespace) -> None:
    print("| loss | step | seconds (median) | fastest | ratio to two forwards | of the fastest |")
    print("|---|---|--:|--:|--:|--:|")
    for row in step_times(options.model, options.dtype, options.batch, options.length, options.rounds):
        print(
            f"| {row['loss']} | {row['step']} | {row['seconds']:.3f} | {row['fastest']:.3f} | {row['ratio']:.2f} | "
            f"{row['ratio_fastest']:.2f} |",
            flush=True,
        )


def gradients_of(options: argparse.Namespace) -> None:
    print("| weights | z | epsilon | relative error (median) | worst |\n|---|---|--:|--:|--:|")
    for row in gradient_errors(
        options.model, options.dtype, options.seeds, options.epsilons, options.distributions.split(",")
    ):
        print(
            f"| {row['dtype']} | {row['distribution']} | {row['epsilon']:g} | {row['error']:.3f} | "
            f"{row['worst']:.3f} |",
            flush=True,
        )


def memory_of(options: argparse.Namespace) -> None:
    serving = 0
    print("| method | peak | over serving |\n|---|--:|--:|")
    for method in options.methods.split(","):
        peak = run(options.model, method, "memory", "--dtype", options.dtype)["peak_bytes"]
        serving = serving or peak
        print(f"| {method} | {peak / 1e6:.0f} MB | {peak / serving:.2f} |", flush=True)


def accuracies_of(options: argparse.Namespace) -> None:
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    keys = ("model", "method", "seed", "judge", "lr", "steps_asked")
    there = {tuple(json.loads(line).get(key) for key in keys) for line in lines}
    end = time.monotonic() + options.until
    for seed in map(int, options.seeds.split(",")):
        for method, _, asked in (name.partition("@") for name in options.methods.split(",")):
            steps = int(asked or options.steps)
            key = (options.model.name, method, seed, options.judge, options.lr, steps)
            left = end - time.monotonic() - _OVERHEAD
            whole = method.partition(":")[0] in WHOLE
            if key in there or left < (options.seconds if whole else min(options.seconds, _SHORTEST)):
                continue
            more = ["--judge", options.judge, "--dtype", options.dtype, "--points", str(options.points)]
            more += ["--steps", str(steps)] + (["--lr", str(options.lr)] if options.lr is not None else [])
            state = options.output.with_suffix(f".{method.replace(':', '-')}-{seed}-{options.judge}-{steps}.state")
            if not whole and left < float("inf"):
                more += ["--state", str(state), "--slice", str(left)]
            result = run(options.model, method, str(seed), str(options.seconds), *more)
            if "curve" not in result:
                print(f"{method} seed {seed}: put aside after {result['steps']} steps", flush=True)
                return
            with options.output.open("a") as file:
                file.write(json.dumps(dict(zip(keys, key, strict=True)) | result) + "\n")
            state.unlink(missing_ok=True)
            last = result["curve"][-1]
            print(
                f"{method} seed {seed}: {last['accuracy']:.1%}, loss {last['loss']:.3f} after {result['steps']} steps, "
                f"{result['seconds']:.0f} s, {result['peak_bytes'] / 1e6:.0f} MB {result['used']}",
                flush=True,
            )


def grouped(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["method"]].append(row)
    return dict(found)


def table(rows: list[Row]) -> str:
    """Markdown: a method's mean over seeds at its end, with the spread (largest minus smallest)."""
    lines = [
        "| method | seeds | steps | seconds | accuracy | spread | best | held-out loss | spread | peak | step sizes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for method, group in grouped(rows).items():
        ends = [row["curve"][-1] for row in group]
        best = mean(max(point["accuracy"] for point in row["curve"]) for row in group)
        right, loss = ([end[key] for end in ends] for key in ("accuracy", "loss"))
        steps, seconds, peak = (mean(row[key] for row in group) for key in ("steps", "seconds", "peak_bytes"))
        sizes = ", ".join(f"{k} {mean(row['used'][k] for row in group):.2g}" for k in group[0]["used"])
        apart = [f"{max(right) - min(right):.1%}", f"{max(loss) - min(loss):.3f}"] if len(group) > 1 else ["", ""]
        lines.append(
            f"| {method} | {len(group)} | {steps:.0f} | {seconds:.0f} | {mean(right):.1%} | {apart[0]} | "
            f"{best:.1%} | {mean(loss):.3f} | {apart[1]} | {peak / 1e6:.0f} MB | {sizes} |"
        )
    right, loss = ([row["curve"][0][key] for row in rows] for key in ("accuracy", "loss"))
    lines.append(f"| before | | | | {mean(right):.1%} | | | {mean(loss):.3f} | | | |")
    return "\n".join(lines)


def plot(panels: list[list[Row]], path: Path) -> None:
    """Per file accuracy and held-out loss against time, and accuracy against peak memory; lines are seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 3, figsize=(15, 4.4 * len(panels)), squeeze=False)
    for line, rows in zip(axes, panels, strict=True):
        for color, (method, group) in enumerate(grouped(rows).items()):
            for i, row in enumerate(group):
                x = [point["seconds"] for point in row["curve"]]
                label = method if i == 0 else None
                look = {"color": pyplot.get_cmap("tab20").colors[color % 20], "marker": "os^"[color // 20 % 3]}
                style = look | {"markersize": 3}
                line[0].plot(x, [100 * point["accuracy"] for point in row["curve"]], label=label, **style)
                line[1].plot(x, [point["loss"] for point in row["curve"]], **style)
                end = 100 * row["curve"][-1]["accuracy"]
                line[2].plot([row["peak_bytes"] / 1e6], [end], linestyle="", **look)
        titles = ("held-out accuracy in %", "held-out loss", "held-out accuracy in % at the end")
        for panel, title, label in zip(line, titles, ("seconds", "seconds", "peak memory in MB"), strict=True):
            panel.set_title(f"{rows[0]['model']}: {title}", fontsize=10)
            panel.set_xlabel(label)
            panel.grid(alpha=0.3)
        line[2].legend(*line[0].get_legend_handles_labels(), fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(options: argparse.Namespace) -> None:
    panels = [[json.loads(line) for line in path.read_text().splitlines()] for path in options.files]
    for path, rows in zip(options.files, panels, strict=True):
        print(f"{path.name}\n\n{table(rows)}\n")
    if options.plot:
        plot(panels, options.plot)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, action: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.set_defaults(action=action)
        if name != "report":
            made.add_argument("model", type=Path)
            made.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
        return made

    step = command("step", steps_of)
    step.add_argument("--batch", type=int, default=8)
    step.add_argument("--length", type=int, default=64)
    step.add_argument("--rounds", type=int, default=9)
    gradient = command("gradient", gradients_of)
    gradient.add_argument("--seeds", type=int, default=4)
    gradient.add_argument("--epsilons", type=_numbers, default=EPSILONS, help="separated by commas")
    gradient.add_argument("--distributions", default=",".join(DISTRIBUTIONS))
    command("memory", memory_of).add_argument("--methods", default=MEMORY, help="the first is what the others go over")
    runs = command("accuracy", accuracies_of)
    runs.add_argument("--output", type=Path, required=True)
    runs.add_argument("--methods", default=METHODS)
    runs.add_argument("--seeds", default="0,1,2")
    runs.add_argument("--seconds", type=float, default=60.0, help="of training")
    runs.add_argument("--steps", type=int, default=1000, help="at the most; step sizes fall until there")
    runs.add_argument("--points", type=int, default=4, help="how often it is judged on the way")
    runs.add_argument("--lr", type=float, help="in place of the method's own")
    runs.add_argument("--judge", choices=("heldout", "tune"), default="heldout")
    runs.add_argument("--until", type=float, default=float("inf"), metavar="S")
    reported = command("report", report)
    reported.add_argument("files", type=Path, nargs="+")
    reported.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.action(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
