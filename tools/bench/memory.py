"""Measures what passes really take, with a real engine and a real trainer, against what budget/footprint.py predicts.

    python -m tools.bench memory MODEL.gguf                    every plan, as a table
    python -m tools.bench memory MODEL.gguf --only k=4         those whose name contains this
    python -m tools.bench memory MODEL.gguf --json FILE --again     new predictions for what FILE holds, nothing runs
    python -m tools.bench memory MODEL.gguf --compare          MeZO and ElasticZO beside BP with LoRA and full BP
    python -m tools.bench memory MODEL.gguf --labels --minutes 20   tasks of 2 to 77 labels, texts of 20 to 900 tokens
                                                               and 2 to 30 blocks, as many as there is time for
    ... --json FILE                 also as JSON; what FILE holds already is kept, shown, and not run again

Each plan runs as a pass drives it (encode, tap, train, zeroth-order steps, score, drift) on a few examples, which is
enough to reach the peak. Memory is the proportional set size, read every 50 ms, beyond what serving takes. MiB
throughout. A plan holds if measured <= predicted <= 1.25 x measured, for the trainer, which may be ended at its limit,
and for all processes together.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentd.budget.footprint import MIB
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.workload import Workload
from agentd.formats.gguf_header import read_header
from tools.bench.memory_compare import compare, comparison, projection
from tools.bench.memory_runs import Case, measure, predicted

CASES = [
    Case("mezo", 0),
    Case("mezo", 0, length=96, objective="completion"),
    Case("mezo", 0, length=512),
    Case("mezo", 0, length=1024),
    Case("mezo", 0, length=1024, objective="completion"),
    Case("mezo", 0, context=512),
    *(Case("suffix-bp", 1, batch=batch) for batch in (1, 8, 16)),
    Case("suffix-bp", 1, length=96, objective="completion"),
    Case("suffix-bp", 1, length=512),
    Case("suffix-bp", 1, length=1024),
    Case("elasticzo", 2),
    Case("suffix-bp", 2, length=512, objective="completion"),
    *(Case("suffix-bp", 4, batch=batch) for batch in (1, 8, 16)),
    Case("suffix-bp", 4, length=512, batch=8),
    Case("suffix-bp", 4, length=1024, batch=1),
    Case("suffix-bp", 4, checkpoint=True),
    Case("suffix-bp", 4, fp32=True),
    Case("suffix-bp", 8),
    Case("suffix-bp", 8, length=96, objective="completion"),
    Case("suffix-bp", 8, length=1024, checkpoint=True),
    Case("suffix-bp", 16, batch=8),
    Case("suffix-bp", 16, batch=8, checkpoint=True),
    Case("suffix-bp", 16, batch=8, length=512),
    Case("suffix-bp", 16, batch=8, length=512, checkpoint=True),
    Case("suffix-bp", 16, batch=8, fp32=True),
    Case("suffix-bp", 30),
    Case("suffix-bp", 30, batch=1, length=512),
    *(Case("blockwise-bp", 30, batch=batch) for batch in (1, 8, 16)),
    Case("blockwise-bp", 30, length=96, objective="completion"),
    Case("blockwise-bp", 30, length=512, batch=8),
    Case("blockwise-bp", 30, length=1024, batch=8),
    Case("blockwise-bp", 30, fp32=True),
    Case("mezo", 0, objective="call"),
    *(Case("suffix-bp", k, objective="call") for k in (1, 4, 16)),
    Case("suffix-bp", 16, objective="call", checkpoint=True),
    Case("blockwise-bp", 30, objective="call"),
]


LABELS, TEXTS, BLOCKS = (2, 4, 8, 16, 77), (20, 100, 250, 900), (2, 8, 16, 30)
_TEMPLATE = 40  # tokens around a text


def label_cases() -> list[Case]:
    """Every number of labels with every length and number of blocks, in an order whose beginning has some of each."""
    grid = list(itertools.product(enumerate(LABELS), enumerate(TEXTS), enumerate(BLOCKS)))
    grid.sort(key=lambda cell: (sum(i for i, _ in cell) % 4, sum(i for i, _ in cell) // 4 % 2))
    return [
        Case("suffix-bp", k, labels=labels, length=text + _TEMPLATE, batch=8) for (_, labels), (_, text), (_, k) in grid
    ]


def ratios(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(process, predicted / measured) of a result."""
    for name in ("engine", "trainer", "together"):
        if result["measured"][name]:
            yield name, result["predicted"][name] / result["measured"][name]


def holds(result: dict[str, Any]) -> bool:
    return all(1 <= ratio <= 1.25 for name, ratio in ratios(result) if name != "engine")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: per process and together, measured, predicted and their ratio."""
    columns = ["plan", "batch", "tokens", "context", "objective", "labels"]
    columns += [
        f"{name}{what}" for name in ("engine", "trainer", "together") for what in ("", ", predicted", ", ratio")
    ]
    lines = ["| " + " | ".join([*columns, "holds"]) + " |", "|---|--:|--:|--:|---|--:|" + "--:|" * 9 + "---|"]
    for result in results:
        cells = [result["name"].partition(" batch=")[0], str(result["batch"])]
        cells += [str(result["longest"]), str(result["context"]), result["objective"], str(result.get("labels", 2))]
        by_term = dict(ratios(result))
        for name in ("engine", "trainer", "together"):
            measured, predicted = result["measured"][name], result["predicted"][name]
            figures = (
                [f"{measured / MIB:.0f}", f"{predicted / MIB:.0f}", f"{by_term[name]:.2f}"] if measured else ["–"] * 3
            )
            cells += figures
        lines.append("| " + " | ".join([*cells, "yes" if holds(result) else "**no**"]) + " |")
    return "\n".join(lines)


def run_labels(model: Path, only: str, minutes: float, file: Path | None) -> list[dict[str, Any]]:
    """As many of the label cases as there is time for; `file` has a line for each, and those it has are not run."""
    results: list[dict[str, Any]] = []
    if file and file.exists():
        results = [json.loads(line) for line in file.read_text().splitlines()]
    known = {result["name"] for result in results}
    begin = time.monotonic()
    for case in label_cases():
        if only not in case.name or case.name in known:
            continue
        if time.monotonic() - begin > 60 * minutes:
            break
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(model, case, Path(folder)))
        results.append(result)
        figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(result))
        print(f"{case.name}: {result['seconds']} s, predicted / measured: {figures}", file=sys.stderr, flush=True)
        if file:
            with file.open("a") as out:
                out.write(json.dumps(result) + "\n")
    return results


def run_cases(model: Path, only: str, file: Path | None) -> list[dict[str, Any]]:
    """Measures the cases whose name contains `only` and which `file` does not hold; returns those measured so far."""
    results: dict[str, dict[str, Any]] = {}
    if file and file.exists():
        results = {result["name"]: result for result in json.loads(file.read_text())["plans"]}
    for case in CASES:
        if only not in case.name or case.name in results:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(model, case, Path(folder)))
        results[case.name] = result
        figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(result))
        print(f"{case.name}: {result['seconds']} s, predicted / measured: {figures}", file=sys.stderr, flush=True)
        if file:
            file.write_text(json.dumps({"plans": _in_order(results)}, indent=1))
    return _in_order(results)


def _in_order(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [results[case.name] for case in CASES if case.name in results]


def predicted_again(model: Path, file: Path) -> list[dict[str, Any]]:
    """The results in `file` with what the footprint says now."""
    architecture = ModelShapes.from_header(read_header(model))
    results: list[dict[str, Any]] = json.loads(file.read_text())["plans"]
    cases = {case.name: case for case in CASES}
    for result in results:
        plan = cases[result["name"]].plan(architecture, Workload(**result["workload"]))
        result["predicted"] = predicted(plan)
    file.write_text(json.dumps({"plans": results}, indent=1))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--only", default="", metavar="TEXT", help="only plans whose name contains TEXT")
    parser.add_argument("--compare", action="store_true", help="the comparison with BP instead")
    parser.add_argument("--labels", action="store_true", help="tasks of many labels instead")
    parser.add_argument("--minutes", type=float, default=20, help="for --labels: no case is begun after these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--again", action="store_true", help="predict anew what --json FILE holds; measure nothing")
    options = parser.parse_args()
    if options.again and not options.json:
        parser.error("--again needs --json FILE")
    if options.compare:
        rows = compare(options.model)
        print(comparison(rows) + "\n\n" + projection())
        if options.json:
            options.json.write_text(json.dumps({"compare": rows}, indent=1))
        return 0
    if options.labels:
        results = run_labels(options.model, options.only, options.minutes, options.json)
    elif options.again:
        results = predicted_again(options.model, options.json)
    else:
        results = run_cases(options.model, options.only, options.json)
    print(table(results))
    good = sum(map(holds, results))
    promise = "measured <= predicted <= 1.25 x measured, for the trainer and for all processes together"
    print(f"\n{good} of {len(results)} plans hold: {promise}")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
