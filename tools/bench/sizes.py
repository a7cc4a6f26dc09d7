"""Models at their real size: memory and time of each way to train, measured against what is predicted.

    python -m tools.shape_model qwen3 --size 0.6B --quantise Q4_K_M
    python -m tools.bench sizes MODEL.gguf ... [--only k=8] [--length 256] [--json FILE]

The weights may be random: memory and time depend on shapes alone. Texts are cut to --length tokens, a token a
character, as the tokenizers of tools/shape_model.py have it (--characters for others). Each plan runs for two steps on
eight examples, as `memory` runs its own. Predictions are what a pass on this machine would be planned by: the fixed
costs and rates are measured first. A plan holds if measured <= predicted <= 1.25 x measured for the trainer's memory
and for all processes together, and if neither time is more than 1.5 x the other.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentd import models
from agentd.adapt import kinds
from agentd.adapt.kinds.kind import LanguageKind, Probing
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.setting import Machine
from agentd.budget.expectation import epoch_seconds
from agentd.budget.footprint import MIB
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.workload import Workload, computed_tokens
from agentd.config import schema
from agentd.engine.process.activity import Activity
from agentd.formats.gguf_header import read_header
from agentd.methods import BLOCKWISE
from tools.bench.memory import holds, ratios
from tools.bench.memory_runs import Case, measure
from tools.bench.parts import supervisor

BATCH, CONTEXT = 4, 2048
_OFF = 1.5  # a time that is measured, and one that is predicted


def cases(arch: ModelShapes, length: int, characters: float) -> list[Case]:
    plans = [("mezo", 0, False), ("suffix-bp", 2, False), ("suffix-bp", 8, False), ("suffix-bp", 8, True)]
    plans.append((BLOCKWISE, arch.n_layer, False))
    how: dict[str, Any] = {"length": length, "batch": BATCH, "characters": characters, "context": CONTEXT}
    return [Case(method, k, checkpoint=one, **how) for method, k, one in plans]


async def probe(path: Path) -> Machine:
    """What a daemon would measure before it plans a pass on this model."""
    config = schema.load(None, {"AGENTD_MODEL_CONTEXT": str(CONTEXT)})
    kind = kinds.choose(config, models.check(path, config.engine))
    assert isinstance(kind, LanguageKind)
    activity = Activity()
    engine = supervisor(path, activity, CONTEXT)
    await engine.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Training(activity, Path(folder) / "trainer.log")
            return Machine(await kind.probe(config, Probing(engine, trainer, Path(folder), idle=True)))
    finally:
        await engine.stop()


def timed(result: dict[str, Any], case: Case, arch: ModelShapes, machine: Machine) -> dict[str, float]:
    """Seconds of a step, and of the trainer until it begins, measured and predicted."""
    workload, times, speed = Workload(**result["workload"]), result["times"], machine.speed
    if not case.k:
        scored = min(case.examples, 2) * workload.mean + workload.prefix
        return {"step": 2 * statistics.median(times["loss"]), "step, predicted": 2 * scored / speed.forward}
    plan = case.plan(arch, workload)
    some = replace(workload, examples=BATCH, tokens=int(BATCH * workload.mean), micro_tokens=plan.micro_tokens)
    step = epoch_seconds(some, speed, plan, arch)
    if case.method == BLOCKWISE:
        step += computed_tokens(some, plan.micro_tokens) / speed.forward
    ready = sum(times["ready"])
    return {"step": statistics.median(times["step"]), "step, predicted": step, "ready": ready}


def in_time(result: dict[str, Any]) -> bool:
    ratio = float(result["seconds of"]["step, predicted"] / result["seconds of"]["step"])
    return 1 / _OFF <= ratio <= _OFF


def table(results: list[dict[str, Any]]) -> str:
    columns = ["model", "plan", "tokens"]
    columns += [f"{name}{what}" for name in ("trainer", "together") for what in ("", ", predicted", ", ratio")]
    columns += ["seconds a step", "predicted", "ratio", "holds"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|" * 10 + "---|"]
    for result in results:
        cells, by_process = [result["model"], result["name"].partition(" batch=")[0]], dict(ratios(result))
        cells.append(str(result["longest"]))
        for name in ("trainer", "together"):
            measured, predicted = result["measured"][name], result["predicted"][name]
            figures = [f"{measured / MIB:.0f}", f"{predicted / MIB:.0f}", f"{by_process.get(name, 0):.2f}"]
            cells += figures if measured else ["–"] * 3
        step, predicted = (result["seconds of"][name] for name in ("step", "step, predicted"))
        cells += [f"{step:.1f}", f"{predicted:.1f}", f"{predicted / step:.2f}"]
        lines.append("| " + " | ".join([*cells, "yes" if holds(result) and in_time(result) else "**no**"]) + " |")
    return "\n".join(lines)


def run(path: Path, only: str, length: int, characters: float) -> Iterator[dict[str, Any]]:
    arch = ModelShapes.from_header(read_header(path))
    machine = asyncio.run(probe(path))
    print(f"{path.stem}: {json.dumps(dict(machine.probed))}", file=sys.stderr, flush=True)
    for case in cases(arch, length, characters):
        if only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(path, case, Path(folder), machine.as_arguments()["runtime"]))
        result |= {"model": path.stem, "seconds of": timed(result, case, arch, machine)}
        figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(result))
        print(f"{case.name}: {figures}; {result['seconds of']}", file=sys.stderr, flush=True)
        yield result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench sizes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="GGUF files")
    parser.add_argument("--only", default="", metavar="TEXT", help="only plans whose name contains TEXT")
    parser.add_argument("--length", type=int, default=256, metavar="TOKENS", help="of an example (default: 256)")
    parser.add_argument("--characters", type=float, default=1.0, help="of a token (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too, behind those it has")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    for path in options.models:
        for result in run(path, options.only, options.length, options.characters):
            results.append(result)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    print(table(results))
    good = sum(holds(result) and in_time(result) for result in results)
    print(f"\n{good} of {len(results)} plans hold, in memory and in time")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
