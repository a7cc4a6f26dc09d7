"""Measures agentd.int8: accuracy, memory, time, agreement of loss signs, ledger replay. LeNet-5 and PointNet.

    python -m tools.bench int8                          everything, on Fashion-MNIST if it is there
    python -m tools.bench int8 --quick                  minutes to seconds: one seed, few steps, for CI
    python -m tools.bench int8 --budget 280             stops before a run that would exceed 280 seconds; call it again,
                                                        with the same --output, to go on

Results go to --output as JSON after every run; with matplotlib installed, --plot draws the accuracies.
"""

import argparse
import dataclasses
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agentd.int8.architecture import LENET5, POINTNET
from agentd.int8.floating import FloatNetwork
from agentd.int8.weights import quantised
from tools.bench.paper.int8_costs import step_memory, step_time
from tools.bench.paper.int8_data import Images, as_float, load, rotated
from tools.bench.paper.int8_recipes import FINE_TUNING, METHODS, PRETRAINING, SCRATCH
from tools.bench.paper.int8_runs import Outcome, Recipe, train_float, train_int8

ANGLES = (30, 45, 60)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run. `labelled` rotated images are learnt from in fine-tuning."""

    seeds: int
    steps: int
    batch: int
    pretraining: int
    labelled: int
    fine_tuning: int
    test: int
    samples: int
    repeats: int
    angles: tuple[int, ...] = ANGLES
    lenet5_batches: tuple[int, ...] = (32, 256)
    pointnet_batches: tuple[int, ...] = (8,)


FULL = Scale(3, 1500, 128, 2500, 2048, 600, 10_000, 60, 15)
QUICK = Scale(1, 60, 32, 150, 256, 40, 500, 5, 1, (45,), (32,), (1,))


class Bench:
    """The runs that are done, in a file, and those still to do."""

    def __init__(self, path: Path, images: Images, scale: Scale) -> None:
        self.path, self.images, self.scale = path, images, scale
        settings = json.loads(json.dumps({"data": images.name, **dataclasses.asdict(scale)}))
        self.results: dict[str, Any] = {"settings": settings, "torch": torch.__version__, "runs": {}}
        if path.exists():
            results = json.loads(path.read_text())
            if results.get("settings") != settings:
                raise SystemExit(f"{path} has results of other settings; choose another --output or remove it")
            self.results = results

    def work(self, parts: set[str]) -> Iterator[tuple[str, Callable[[], object]]]:
        """(name, what makes its result) of everything not done yet."""
        for name, make in self._all():
            if name.split("/")[0] in parts and name not in self.results["runs"]:
                yield name, make

    def keep(self, name: str, result: object) -> None:
        self.results["runs"][name] = result
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1))
        partial.replace(self.path)

    def _all(self) -> Iterator[tuple[str, Callable[[], object]]]:
        for architecture, batches in ((LENET5, self.scale.lenet5_batches), (POINTNET, self.scale.pointnet_batches)):
            layers = len(architecture.trained_layers())
            for batch in batches:
                for method, bp_layers in METHODS.items():
                    cutoff = layers if method == "BP" else bp_layers
                    name = f"{architecture.name}/{batch}/{method}"
                    yield f"memory/{name}", partial(step_memory, architecture, batch, cutoff)
                    yield f"time/{name}", partial(step_time, architecture, batch, cutoff, self.scale.repeats)
        for seed in range(self.scale.seeds):
            for method in METHODS:
                for precision in ("fp32", "int8"):
                    yield f"scratch/{method}/{precision}/{seed}", partial(self._scratch, method, precision, seed)
            for angle in self.scale.angles:
                for method in METHODS:
                    for precision in ("fp32", "int8"):
                        name = f"rotated {angle}/{method}/{precision}/{seed}"
                        yield name, partial(self._rotated, angle, method, precision, seed)

    def _scratch(self, method: str, precision: str, seed: int) -> dict[str, object]:
        model = FloatNetwork.initialised(LENET5, seed)
        return self._train(model, precision, SCRATCH[method], self.images.train, self._test(), self.scale.steps, seed)

    def _rotated(self, angle: int, method: str, precision: str, seed: int) -> dict[str, object]:
        rows = torch.randperm(len(self.images.train[1]), generator=torch.Generator().manual_seed(1000 + seed))
        rows = rows[: self.scale.labelled]
        train = rotated(self.images.train[0][rows], angle), self.images.train[1][rows]
        x, y = self._test()
        model, steps = self._pretrained(seed), self.scale.fine_tuning
        return self._train(model, precision, FINE_TUNING[method], train, (rotated(x, angle), y), steps, seed)

    def _train(
        self,
        model: FloatNetwork,
        precision: str,
        recipe: Recipe,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        steps: int,
        seed: int,
    ) -> dict[str, object]:
        batch = self.scale.batch
        if precision == "fp32":
            outcome = train_float(model, train, test, recipe, steps=steps, batch=batch, seed=seed)
        else:
            network = quantised(model, as_float(train[0][:256]))
            outcome = train_int8(
                network, train, test, recipe, steps=steps, batch=batch, seed=seed, samples=self.scale.samples
            )
        return dataclasses.asdict(outcome)

    def _pretrained(self, seed: int) -> FloatNetwork:
        """LeNet-5 trained upright by BP in fp32; kept beside the results."""
        path = self.path.with_suffix(f".upright-{seed}.pt")
        model = FloatNetwork.initialised(LENET5, 100 + seed)
        if path.exists():
            return FloatNetwork(LENET5, torch.load(path, weights_only=True))
        self._train(model, "fp32", PRETRAINING, self.images.train, self._test(), self.scale.pretraining, 100 + seed)
        torch.save(model.parameters, path)
        return model

    def _test(self) -> tuple[Tensor, Tensor]:
        x, y = self.images.test
        return x[: self.scale.test], y[: self.scale.test]


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """What is there so far."""
    runs: dict[str, Any] = results["runs"]
    settings = results["settings"]
    for task in dict.fromkeys(name.split("/")[0] for name in runs if name.startswith(("scratch", "rotated"))):
        table = Table(title=f"{settings['data']}, {task}: test accuracy in %, mean ± standard deviation over seeds")
        for column in ("method", "before", "fp32", "int8", "int8 - fp32", "sign agreement", "replay exact"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method in METHODS:
            fp32, int8 = _of(runs, task, method, "fp32"), _of(runs, task, method, "int8")
            if not fp32 and not int8:
                continue
            gaps = [b.accuracy - a.accuracy for a, b in zip(fp32, int8, strict=False)]
            same = [o.same_logits for o in int8 if o.same_logits is not None]
            forward = [o.float_forward for o in int8 if o.float_forward is not None]
            replayed = [o.replayed for o in int8 if o.replayed is not None]
            table.add_row(
                method,
                _spread([o.before for o in fp32 or int8]),
                _spread([o.accuracy for o in fp32]),
                _spread([o.accuracy for o in int8]),
                _spread(gaps),
                f"{statistics.fmean(same):.0f} / {statistics.fmean(forward):.0f} %" if same else "",
                f"{sum(replayed)} of {len(replayed)}" if replayed else "",
            )
        table.caption = "sign agreement: with the float loss of the same logits / with a float forward, W ± z alike"
        yield table
    if any(name.startswith("memory/") for name in runs):
        yield _memory_table(runs)
    if any(name.startswith("time/") for name in runs):
        yield _time_table(runs)


def _memory_table(runs: dict[str, Any]) -> Table:
    table = Table(title="kB of one training step: by the paper's model, and the peak of torch's allocations")
    columns = (
        "network",
        "batch",
        "method",
        "fp32",
        "int8",
        "ratio",
        "over ZO",
        "int8",
        "fp32 peak",
        "int8 peak",
        "ratio",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    for name, run in runs.items():
        if name.startswith("memory/"):
            _, network, batch, method = name.split("/")
            zo = runs.get(f"memory/{network}/{batch}/ZO", run)
            modelled, peak = (
                [f"{run[f'{kind}_{p}'] / 1e3:,.0f}" for p in ("fp32", "int8")]
                + [f"{run[f'{kind}_fp32'] / run[f'{kind}_int8']:.2f}"]
                for kind in ("model", "measured")
            )
            over = [f"{100 * (run[f'model_{p}'] / zo[f'model_{p}'] - 1):.3f} %" for p in ("fp32", "int8")]
            table.add_row(network, batch, method, *modelled, *over, *peak)
    return table


def _time_table(runs: dict[str, Any]) -> Table:
    table = Table(title="milliseconds of one training step (median): forward part + BP and update")
    for column in ("network", "batch", "method", "fp32", "int8", "fp32 / int8"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    for name, run in runs.items():
        if name.startswith("time/"):
            cells = [
                f"{run[f'{p}_total']:.2f} = {run[f'{p}_forward']:.2f} + {run[f'{p}_total'] - run[f'{p}_forward']:.2f}"
                for p in ("fp32", "int8")
            ]
            table.add_row(*name.split("/")[1:], *cells, f"{run['fp32_total'] / run['int8_total']:.2f}")
    return table


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy by method and precision, one panel for each task. Needs matplotlib."""
    figures = importlib.import_module("matplotlib.figure")
    runs = results["runs"]
    tasks = list(dict.fromkeys(name.split("/")[0] for name in runs if name.startswith(("scratch", "rotated"))))
    figure = figures.Figure(figsize=(3.4 * max(1, len(tasks)), 4), layout="constrained")
    for i, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), i + 1, title=task, ylim=(0, 100), ylabel="" if i else "accuracy, %")
        for offset, precision in ((-0.2, "fp32"), (0.2, "int8")):
            accuracies = [[o.accuracy for o in _of(runs, task, method, precision)] for method in METHODS]
            places = [place + offset for place, values in enumerate(accuracies) if values]
            means = [statistics.fmean(values) for values in accuracies if values]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in accuracies if values]
            axes.bar(places, means, 0.38, yerr=errors, label=precision)
        axes.set_xticks(range(len(METHODS)), [name.replace(", ", "\n") for name in METHODS], rotation=45)
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench int8", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four idx files, gzipped or not")
    parser.add_argument("--output", type=Path, default=Path("bench-int8.json"), help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a PNG of the accuracies; needs matplotlib")
    parser.add_argument("--validate", action="store_true", help="test on held-out training images: for tuning recipes")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: proves that it runs")
    parser.add_argument("--seeds", type=int, help="how many seeds")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no run is begun")
    parser.add_argument("--parts", help="comma-separated: scratch, rotated, memory, time (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    scale = QUICK if options.quick else FULL
    if options.seeds is not None:
        scale = dataclasses.replace(scale, seeds=options.seeds)
    images = load(options.data)
    bench = Bench(options.output, images.validation() if options.validate else images, scale)
    requested = (options.parts or "memory,time,scratch,rotated").split(",")
    parts = {part for part in requested if part != "rotated"}
    parts |= {f"rotated {angle}" for angle in scale.angles} if "rotated" in requested else set()
    console = Console()
    longest = 0.0
    for name, make in bench.work(parts):
        now = time.monotonic()
        if now - began + longest > options.budget:
            console.print(f"stopped after {now - began:.0f} s, before {name}; call again to go on")
            break
        bench.keep(name, make())
        longest = max(longest, time.monotonic() - now)
        console.print(f"{time.monotonic() - now:6.1f} s  {name}", highlight=False)
    for table in tables(bench.results):
        console.print(table)
    if options.plot is not None:
        try:
            plot(bench.results, options.plot)
        except ImportError:
            raise SystemExit("--plot needs matplotlib, which is not installed") from None


def _of(runs: dict[str, Any], task: str, method: str, precision: str) -> list[Outcome]:
    prefix = f"{task}/{method}/{precision}/"
    numbered = sorted((int(name.removeprefix(prefix)), run) for name, run in runs.items() if name.startswith(prefix))
    return [Outcome(**run) for _, run in numbered]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
