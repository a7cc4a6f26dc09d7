"""Learning to act: exact calls on home commands of the base, of passes, and of PEFT's LoRA on the same rows.

    python -m tools.bench actions MODEL.gguf --output RESULTS.jsonl
    ... --curve [--examples 25,50,100,200,400]                                      from how many on a pass helps
    ... --runs pass --wrong 0,0.2                                                   a stream with wrong calls in it
    ... --runs pass --memory 300MB,1GB,none --method auto                           what the free memory allows
    ... --runs peft --lrs 3e-4,1e-3,3e-3 --epochs 1,3,5 [--device cuda]             PEFT's grid

A run is a daemon of its own with `memory.limit` as given; it gets `--examples` commands of tools/home.py and a tenth as
many messages that want no call (`--talk`), as JSONL, and learns them in one pass. Seeds choose the rows (0: the first)
and start the learning; of those commands a share (`--wrong`) is corrected to another command's call. PEFT learns the
same rows in the very tokens that the daemon makes of them, with the loss on the assistant's part; its adapter is
imported as a revision, so that all are judged by one path: /v1/chat/completions, greedily, with the tools in the
prompt; commands of other sentence templates with `tool_choice: required`, and talk with `auto`, of which `called` is
the share that was answered by a call.

`seconds` of a pass are those of tap, training and zeroth-order steps, `whole` those from its plan to the end of the
gate; PEFT's count from the first step to the last, and `whole` from the start of its process. Peaks are proportional
set sizes of all processes together: daemon, engine and trainer, or PEFT's. What RESULTS.jsonl holds is not run again;
the table is printed from all of it. PEFT comes with `pip install 'agentd[peft]'`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from agentd import models
from agentd.ctl.errors import CtlError
from agentd.ctl.progress import follow, view
from tools import home
from tools.bench import actions_peft
from tools.bench.actions_rows import encoded, judge, poisoned, sample
from tools.daemon import DaemonProcess, ToolFailed

KEYS = (
    *("model", "run", "examples", "talk", "wrong", "seed", "judged"),
    *("memory", "method", "blocks", "lr", "epochs", "device"),
)
CURVE = [25, 50, 100, 200, 400]  # commands
CONTEXT = 8192  # tokens, of four slots
_LEARNING = ("tap", "train", "zo")
_UNTIL_GATE = ("plan", *_LEARNING, "gate")

Key = dict[str, Any]


def main() -> int:
    options = _options()
    model = options.model or models.fetch_default()
    there: list[dict[str, Any]] = []
    if options.output.exists():
        there = [json.loads(line) for line in options.output.read_text().splitlines()]
    done = {_identity(row) for row in there}
    failed = False
    for key in keys(options, model.stem):
        if _identity(key) in done:
            continue
        try:
            row = key | measure(model, key, options.threads)
        except (ToolFailed, CtlError) as error:
            print(f"{_name(key)}: {error}", file=sys.stderr)
            failed = True
            continue
        there.append(row)
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{_name(row)}: {row['exact']:.1%} exact, {row['called']:.1%} called", file=sys.stderr, flush=True)
    print(table(there))
    return int(failed)


def keys(options: argparse.Namespace, model: str) -> Iterator[Key]:
    """What is to be run, one after the other: within a seed and a number of examples all runs take turns."""
    none = dict.fromkeys(KEYS)
    if "base" in options.runs:
        yield {**none, "model": model, "run": "base", "judged": options.judged}
    for seed, n, wrong in product(options.seeds, options.examples, options.wrong):
        same = {**none, "model": model, "examples": n, "talk": round(options.talk * n), "seed": seed}
        same |= {"judged": options.judged, "wrong": wrong or None}
        if "pass" in options.runs:
            for memory in options.memory:
                how = {"memory": memory, "method": options.method, "blocks": options.blocks}
                yield {**same, "run": "pass", **how}
        if "peft" in options.runs:
            for lr, epochs in product(options.lrs, options.epochs):
                yield {**same, "run": "peft", "lr": lr, "epochs": epochs, "device": options.device}


def measure(model: Path, key: Key, threads: int | str) -> dict[str, Any]:
    """Raises ToolFailed or CtlError where the daemon or PEFT refuses."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        adapter = Path(folder) / "adapter.gguf"
        learned = learn_peft(model, key, threads, adapter) if key["run"] == "peft" else {}
        with DaemonProcess(model, settings(key, threads)) as daemon:
            daemon.start()
            if key["run"] == "pass":
                learned = learn(daemon, key)
            elif key["run"] == "peft":
                serve_adapter(daemon, adapter)
            return {**learned, **judge(daemon, key["judged"]).as_json()}


def settings(key: Key, threads: int | str) -> dict[str, Any]:
    adapt: dict[str, Any] = {"enabled": False, "seed": key["seed"] or 0}
    adapt["trial"] = {"duration": "1s", "max_latency": 1000}
    if key["run"] == "peft":
        adapt["gate"] = {"max_drift": 100, "max_skill_loss": 1}  # what its adapter answers is judged, and nothing else
    return {
        "model": {"context": CONTEXT, "threads": threads},
        "adapt": adapt,
        "memory": {"limit": None if key["memory"] in (None, "none") else key["memory"]},
        "tasks": {home.TASK: {}},
    }


def teach(daemon: DaemonProcess, key: Key) -> None:
    rows = sample(key["examples"], key["talk"], key["seed"])
    lines = [home.example(row) for row in poisoned(rows, key["wrong"] or 0.0, key["seed"])]
    answer = daemon.post("/v1/examples", "\n".join(json.dumps(line) for line in lines).encode())
    if answer.status != 200:
        raise ToolFailed(f"the examples were refused: {answer.error['message']}")


def learn(daemon: DaemonProcess, key: Key) -> dict[str, Any]:
    """One pass: what it was, and what it took. A pass that is refused or rejected is a result, too."""
    teach(daemon, key)
    wishes = {name: key[name] for name in ("method", "blocks") if key[name] not in (None, "auto")}
    start = time.monotonic()
    number = daemon.ctl.post("/admin/adapt", wishes)["pass"]
    with view() as progress:
        ended = follow(daemon.ctl, number, progress)
    row = dict(ended.answer)["pass"]
    phases, peaks = row["phases"] or {}, row["peaks"] or {}
    return {
        "outcome": ended.outcome,
        "reason": ended.reason,
        "plan": {name: row[name] for name in ("method", "blocks", "n_train", "n_holdout")},
        "seconds": round(sum(phases.get(phase, 0.0) for phase in _LEARNING), 1),
        "whole": round(sum(phases.get(phase, 0.0) for phase in _UNTIL_GATE), 1),
        "wall": round(time.monotonic() - start, 1),
        "peak_bytes": peaks.get("total"),
        "beyond_bytes": row["peak_bytes"],
        "predicted_bytes": row["predicted_bytes"],
        "gate": row["gate"],
    }


def learn_peft(model: Path, key: Key, threads: int | str, adapter: Path) -> dict[str, Any]:
    tokens = adapter.with_name("tokens.jsonl")
    with DaemonProcess(model, settings(key, threads)) as daemon:
        daemon.start()
        teach(daemon, key)
        daemon.stop()
        encoded(model, daemon.state, tokens)
    return actions_peft.train(model, tokens, adapter, key["seed"], key["lr"], key["epochs"], key["device"])


def serve_adapter(daemon: DaemonProcess, adapter: Path) -> None:
    archive = actions_peft.archived(adapter, daemon.status()["model"]["sha256"], adapter.with_name("archive"))
    number = daemon.ctl.send("/admin/import", archive)["pass"]
    with view() as progress:
        ended = follow(daemon.ctl, number, progress)
    if ended.outcome != "committed":
        raise ToolFailed(f"PEFT's adapter was {ended.outcome}: {ended.reason}")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a run."""
    lines = [
        "| run | examples | wrong | seed | exact | called | learned | whole | peak | outcome |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["examples"] or 0, row["run"], str(row["memory"]))):
        seconds, whole, peak = row.get("seconds"), row.get("whole"), row.get("peak_bytes")
        wrong = row.get("wrong")
        lines.append(
            f"| {_name(row)} | {row['examples'] or ''} | {f'{wrong:.0%}' if wrong else ''} "
            f"| {'' if row['seed'] is None else row['seed']} "
            f"| {row['exact']:.1%} | {row['called']:.1%} | {f'{seconds:.0f} s' if seconds else ''} "
            f"| {f'{whole:.0f} s' if whole else ''} | {f'{peak / 1e6:.0f} MB' if peak else ''} "
            f"| {row.get('outcome', '')} |"
        )
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    match row["run"]:
        case "pass":
            plan = row.get("plan") or {}
            method = f"{row['method']}{'' if row['blocks'] in (None, 'auto') else ':' + str(row['blocks'])}"
            what = f", {plan['method']} k = {plan['blocks']}" if plan.get("method") else ""
            return f"{row['model']}: pass {method}, memory {row['memory']}{what}"
        case "peft":
            return f"{row['model']}: PEFT, lr {row['lr']:g}, {row['epochs']} epochs, {row['device']}"
        case _:
            return f"{row['model']}: base"


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEYS)


def _options() -> argparse.Namespace:
    def listed(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    def number(text: str) -> int | str:
        return text if text == "auto" else int(text)

    parser = argparse.ArgumentParser(description="Learning to act: the base, passes, and PEFT's LoRA.")
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF file; else the default model")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--runs", type=listed(str), default=["base", "pass", "peft"])
    parser.add_argument("--curve", action="store_true", help="the base and passes on more and more commands")
    parser.add_argument("--examples", type=listed(int), metavar="N,...", help="default: 640; of a curve 25 to 400")
    parser.add_argument("--wrong", type=listed(float), default=[0.0], metavar="SHARE,...", help="of the commands")
    parser.add_argument(
        "--talk", type=float, default=0.1, metavar="SHARE", help="messages that want no call, a command"
    )
    parser.add_argument("--seeds", type=listed(int), default=[0], metavar="N,...")
    parser.add_argument("--judged", type=int, metavar="N", help="of the held-out commands, and of the talk; else all")
    parser.add_argument("--memory", type=listed(str), default=["1GB"], metavar="SIZE|none,...")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--blocks", type=number, default="auto")
    parser.add_argument("--threads", type=number, default="auto", help="of the daemon's engine")
    parser.add_argument("--lrs", type=listed(float), default=[3e-4, 1e-3, 3e-3], metavar="LR,...")
    parser.add_argument("--epochs", type=listed(int), default=[1, 3, 5], metavar="N,...")
    parser.add_argument("--device", default="cpu", help="of PEFT: cpu, or cuda, whose times say nothing (default: cpu)")
    options = parser.parse_args()
    if options.curve:
        options.runs = ["base", "pass"]
    options.examples = options.examples or (CURVE if options.curve else [640])
    return options


if __name__ == "__main__":
    sys.exit(main())
