"""Measures what passes really take, with a real engine and a real trainer, against what budget/footprint.py predicts.

    python -m tools.bench_memory MODEL.gguf                    every plan, as a table
    python -m tools.bench_memory MODEL.gguf --only k=4         those whose name contains this
    python -m tools.bench_memory MODEL.gguf --json FILE --again     new predictions for what FILE holds, nothing runs
    python -m tools.bench_memory MODEL.gguf --compare          MeZO and ElasticZO beside BP with LoRA and full BP
    ... --json FILE                                            also as JSON; what FILE holds already is kept and shown

Each plan runs as a pass drives it (open, encode, tap, train, zeroth-order steps, score, drift) on a few examples, which
is enough to reach the peak. Memory is the proportional set size, read every 50 ms; for the engine, what is beyond
serving. MiB throughout. A plan holds if measured <= predicted <= 1.25 x measured.
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentd.adapt.adaptation_pass import neutral_texts
from agentd.adapt.training import Training
from agentd.budget import probe
from agentd.budget.footprint import (
    MIB,
    Architecture,
    Workload,
    daemon_terms,
    engine_terms,
    serving_terms,
    total,
    trainer_terms,
)
from agentd.engine.activity import Activity
from agentd.engine.client import EngineClient
from agentd.engine.protocol import Generate, Sampling
from agentd.gguf_header import read_header
from tools.extract_reviews import OUTPUT as REVIEWS

THREADS = 2
QUESTION = "Did the reviewer like this movie? Answer yes or no.\n\n"
ANSWER = "I would say that the reviewer did like it, mostly for its actors and less for its plot, which is thin."
CHARACTERS_PER_TOKEN = 4.6  # of the reviews; a little high, so that examples stay just within their length


@dataclass(frozen=True)
class Case:
    """One plan on one kind of example. `length` in tokens, the chat template included; `context` is model.context."""

    k: int
    length: int = 64
    batch: int = 16
    context: int = 2048
    objective: str = "choice"
    checkpoint: bool = False

    @property
    def method(self) -> str:
        return "elasticzo" if self.k else "mezo"

    @property
    def name(self) -> str:
        kept = ", checkpointed" if self.checkpoint else ""
        return f"k={self.k} batch={self.batch} length={self.length} context={self.context} {self.objective}{kept}"

    @property
    def examples(self) -> int:
        return 40 if self.length <= 128 else 9


CASES = [
    Case(0),
    Case(0, length=96, objective="completion"),
    Case(0, length=512),
    Case(0, length=512, objective="completion"),
    Case(0, context=512),
    Case(0, context=1024),
    *(Case(1, batch=batch) for batch in (1, 8, 16)),
    Case(1, length=96, objective="completion"),
    Case(1, length=512),
    Case(1, length=512, objective="completion"),
    Case(1, context=512),
    Case(2),
    Case(2, length=96, objective="completion"),
    Case(2, length=512),
    *(Case(4, batch=batch) for batch in (1, 8, 16)),
    Case(4, length=96, objective="completion"),
    Case(4, length=512, batch=8),
    Case(4, context=1024),
    Case(4, checkpoint=True),
    Case(8),
    Case(8, length=96, objective="completion"),
    Case(8, length=512, batch=1),
    Case(8, checkpoint=True),
    Case(30),
    Case(30, batch=1),
    Case(30, length=96, objective="completion"),
    Case(30, checkpoint=True),
    Case(30, length=512, batch=8, checkpoint=True),
]


class Watch:
    """Peaks of the processes' proportional set sizes in bytes, each by itself and all at one moment."""

    def __init__(self) -> None:
        self.engine: int | None = None
        self.training: Training | None = None
        self.peaks: dict[str, int] = {}
        self.total = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                await asyncio.to_thread(self.sample)
                await asyncio.sleep(0.05)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()

    def sample(self) -> None:
        pids = {"engine": self.engine, "trainer": self.training.pid if self.training else None}
        sizes = {name: probe.pss(pid) or 0 for name, pid in pids.items() if pid is not None}
        for name, size in sizes.items():
            self.peaks[name] = max(size, self.peaks.get(name, 0))
        self.total = max(self.total, sum(sizes.values()))


def write_examples(path: Path, case: Case) -> None:
    """Reviews, one after the other, until an example has its length."""
    texts = [json.loads(line)["text"] for line in REVIEWS.read_text().splitlines()]
    chosen = random.Random(0)
    answer = 26 if case.objective == "completion" else 1
    characters = int((case.length - 38 - answer) * CHARACTERS_PER_TOKEN * (0.8 if case.length <= 128 else 0.9))
    with path.open("w") as file:
        for i in range(case.examples):
            text = ""
            while len(text) < characters:
                text += chosen.choice(texts) + " "
            message = {"role": "user", "content": QUESTION + text[:characters]}
            task: dict[str, Any] = {"choices": ["yes", "no"], "target": "yes" if i % 2 else "no"}
            if case.objective == "completion":
                task = {"choices": [], "target": ANSWER}
            file.write(json.dumps({"input": {"messages": [message]}, **task}) + "\n")


def workload_of(tokens: list[dict[str, Any]], prefix: int, case: Case) -> Workload:
    """The workload as it is, in the footprint's terms."""
    lengths = [len(sequence) - prefix for tree in tokens for sequence in tree["sequences"]]
    scored = [{(s, p) for part in (*t["choices"], t["target"]) for s, p, _ in part} for t in tokens]
    return Workload(
        seq_len=max(lengths),
        tokens=sum(lengths),
        examples=len(tokens),
        batch=case.batch,
        prefix=prefix,
        scored=max(map(len, scored)),
        context=case.context,
        checkpoint=case.checkpoint,
        sequences=max(len(tree["sequences"]) for tree in tokens),
    )


async def measure(model: Path, case: Case, folder: Path) -> dict[str, Any]:
    """Runs the pass; its peaks and predictions in bytes."""
    architecture = Architecture.from_header(read_header(model))
    settings = {"engine": "llamacpp", "path": str(model), "context": case.context, "slots": 4}
    client = EngineClient({**settings, "threads": THREADS, "gpu_layers": "auto"})
    watch = Watch()
    started = time.monotonic()
    info = await client.start()
    try:
        # One request first: only then all weights and buffers of serving are in memory.
        request = Generate(
            "first", {"messages": [{"role": "user", "content": QUESTION}]}, Sampling(temperature=0.0), 16
        )
        async for _ in client.generate(request):
            pass
        await asyncio.sleep(0.2)
        watch.engine = client.pid
        watch.sample()
        serving = watch.peaks["engine"]
        async with watch.running():
            source, encoded = folder / "examples.jsonl", folder / "tokens.jsonl"
            write_examples(source, case)
            await client.call("open")
            await client.call("encode", source=str(source), target=str(encoded))
            tokens = [json.loads(line) for line in encoded.read_text().splitlines()]
            if errors := [tree["error"] for tree in tokens if "error" in tree]:
                raise SystemExit(f"{case.name}: {errors[0]}")
            await client.call("use", weights="0")
            numbers = list(range(len(tokens)))
            adapter: Path | None = None
            first = info.n_layer - max(1, case.k)
            index = await client.call("tap", examples=numbers, first=first, end=first + 1, path=str(folder / "tap"))
            if case.k:
                adapter = folder / "adapter.gguf"
                watch.training = Training(Activity(), folder / "trainer.log")
                spec = trainer_spec(model, case, folder, tokens, index, info.n_layer)
                await watch.training.run(spec, folder / "trainer.json", lambda _: None)
                watch.training = None
                await client.call("stage", weights="candidate", adapter=str(adapter), control=None)
                await client.call("use", weights="candidate")
            few = numbers[:16] if case.length <= 128 else numbers[:2]
            for scale in (0.1, -0.1):
                await client.call("loss", examples=few, nll_weight=0.1, seed=1, scale=scale)
            await client.call("update", seed=1, coefficient=1e-3)
            control = folder / "control.gguf"
            await client.call("write_control", path=str(control))
            await client.call("score", examples=few)
            path = None if adapter is None else str(adapter)
            await client.call("stage", weights="candidate", adapter=path, control=str(control))
            await client.call("drift", texts=neutral_texts(), reference="0", candidate="candidate")
            await client.call("abandon")
    finally:
        await client.stop()
    workload = workload_of(tokens, index["prefix_rows"], case)
    measured = {"engine": watch.peaks["engine"] - serving, "trainer": watch.peaks.get("trainer", 0)}
    return {
        **asdict(case),
        "name": case.name,
        "method": case.method,
        "seconds": round(time.monotonic() - started, 1),
        "longest": workload.longest,
        "workload": workload.as_json(),
        "serving": serving,
        "measured": {**measured, "together": watch.total - serving},
        "predicted": predict(architecture, workload, case.k),
    }


def predict(architecture: Architecture, workload: Workload, k: int) -> dict[str, int]:
    """Bytes by process and together; the daemon's own part is not measured here."""
    engine = total(engine_terms(architecture, workload, k))
    trainer = total(trainer_terms(architecture, workload, k)) if k else 0
    return {"engine": engine, "trainer": trainer, "together": engine + trainer}


def trainer_spec(
    model: Path, case: Case, folder: Path, tokens: list[dict[str, Any]], index: dict[str, Any], n_layer: int
) -> dict[str, Any]:
    """One epoch, as adapt/ would ask for it."""
    examples = [
        {
            "id": str(i),
            "dev": i % 8 == 0,
            "task": "reviews",
            "sequences": [{"offset": offset, "n": n} for offset, n in places],
            **{name: tree[name] for name in ("choices", "correct", "target")},
        }
        for i, (tree, places) in enumerate(zip(tokens, index["sequences"], strict=True))
    ]
    train = {"batch": case.batch, "max_epochs": 1, "threads": THREADS, "checkpoint": case.checkpoint}
    return {
        "model": str(model),
        "first_block": n_layer - case.k,
        "end_block": n_layer,
        "tap": {"path": str(folder / "tap"), "n_embd": index["n_embd"]},
        "prefix": {"offset": 0, "n": index["prefix_rows"]},
        "examples": examples,
        "train": train,
        "initial": None,
        "control": None,
        "output": str(folder / "adapter.gguf"),
    }


def ratios(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(process, predicted / measured) of a result."""
    for name in ("engine", "trainer", "together"):
        if result["measured"][name]:
            yield name, result["predicted"][name] / result["measured"][name]


def holds(result: dict[str, Any]) -> bool:
    return all(1 <= ratio <= 1.25 for _, ratio in ratios(result))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: per process and together, measured, predicted and their ratio."""
    columns = ["plan", "batch", "tokens", "context", "objective"]
    columns += [
        f"{name}{what}" for name in ("engine", "trainer", "together") for what in ("", ", predicted", ", ratio")
    ]
    lines = ["| " + " | ".join([*columns, "holds"]) + " |", "|---|--:|--:|--:|---|" + "--:|" * 9 + "---|"]
    for result in results:
        method = f"{result['method']} k={result['k']}" if result["k"] else "mezo"
        cells = [method + (" checkpointed" if result["checkpoint"] else ""), str(result["batch"])]
        cells += [str(result["longest"]), str(result["context"]), result["objective"]]
        found = dict(ratios(result))
        for name in ("engine", "trainer", "together"):
            measured, predicted = result["measured"][name], result["predicted"][name]
            shown = [f"{measured / MIB:.0f}", f"{predicted / MIB:.0f}", f"{found[name]:.2f}"] if measured else ["–"] * 3
            cells += shown
        lines.append("| " + " | ".join([*cells, "yes" if holds(result) else "**no**"]) + " |")
    return "\n".join(lines)


def run_cases(model: Path, only: str, file: Path | None) -> list[dict[str, Any]]:
    """Measures the cases whose name contains `only`; earlier results in `file` are kept where not measured again."""
    results: dict[str, dict[str, Any]] = {}
    if file and file.exists():
        results = {result["name"]: result for result in json.loads(file.read_text())["plans"]}
    for case in CASES:
        if only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(model, case, Path(folder)))
        results[case.name] = result
        shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(result))
        print(f"{case.name}: {result['seconds']} s, predicted / measured: {shown}", file=sys.stderr, flush=True)
        if file:
            order = [known.name for known in CASES if known.name in results]
            file.write_text(json.dumps({"plans": [results[name] for name in order]}, indent=1))
    return [results[known.name] for known in CASES if known.name in results]


def predicted_again(model: Path, file: Path) -> list[dict[str, Any]]:
    """The results in `file` with what the footprint says now."""
    architecture = Architecture.from_header(read_header(model))
    results: list[dict[str, Any]] = json.loads(file.read_text())["plans"]
    for result in results:
        result["predicted"] = predict(architecture, Workload(**result["workload"]), result["k"])
    file.write_text(json.dumps({"plans": results}, indent=1))
    return results


# --- the headline: the same examples, the same batch, beside backpropagation through the whole model


def compare(model: Path) -> list[dict[str, Any]]:
    """Peak memory of everything that runs, in bytes, from plain serving to full BP."""
    rows: list[dict[str, Any]] = []
    serving = 0
    for k in (0, 1, 4):
        case = Case(k)
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(model, case, Path(folder)))
        if not rows:
            serving = result["serving"]
            rows.append({"what": "plain serving", "bytes": serving, "beyond": 0})
        name = f"ElasticZO, k={k}" if k else "MeZO"
        added = result["measured"]["together"]
        rows.append({"what": f"agentd, {name}", "bytes": result["serving"] + added, "beyond": added})
    for kind, name in (("lora", "LoRA r=8 on every linear layer, BP, fp32"), ("full", "full BP, AdamW, fp32")):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "examples.jsonl"
            write_examples(source, Case(1))
            command = [sys.executable, "-m", "tools.bench_backprop", str(model), str(source), kind]
            print(f"{name}: runs", file=sys.stderr, flush=True)
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak = int(json.loads(output.splitlines()[-1])["peak_bytes"])
        rows.append({"what": name, "bytes": peak, "beyond": peak})
    for row in rows:
        row["to_serving"] = row["bytes"] / serving
    return rows


def comparison(rows: list[dict[str, Any]]) -> str:
    lora = next(row["bytes"] for row in rows if row["what"].startswith("LoRA"))
    lines = ["| | peak, MiB | beyond serving, MiB | x plain serving | x LoRA BP |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        figures = [row["bytes"] / MIB, row["beyond"] / MIB]
        cells = [f"{figure:.0f}" for figure in figures] + [f"{row['to_serving']:.2f}", f"{row['bytes'] / lora:.2f}"]
        lines.append("| " + " | ".join([row["what"], *cells]) + " |")
    return "\n".join(lines)


LARGER = (
    Architecture.dense("1.1B", n_layer=22, n_embd=2048, n_head=32, n_head_kv=4, n_ff=5632, n_vocab=32000, bits=4.5),
    Architecture.dense("7B", n_layer=32, n_embd=4096, n_head=32, n_head_kv=32, n_ff=11008, n_vocab=32000, bits=4.5),
)
SERVED = 2048  # tokens in the serving KV cache


def projection() -> str:
    """What the footprint says of MeZO beside serving for larger models, which do not run here."""
    work = Workload(seq_len=64, tokens=512 * 48, examples=512, prefix=38, scored=2)
    lines = ["| by the footprint | serving, MiB | MeZO beyond, MiB | x serving |", "|---|--:|--:|--:|"]
    for architecture in LARGER:
        serving = total(serving_terms(architecture, kv_tokens=SERVED))
        beyond = total(daemon_terms(work) + engine_terms(architecture, work))
        cells = [f"{architecture.name}, 4.5 bits", f"{serving / MIB:.0f}", f"{beyond / MIB:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{1 + beyond / serving:.2f}"]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench_memory", description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--only", default="", metavar="TEXT", help="only plans whose name contains TEXT")
    parser.add_argument("--compare", action="store_true", help="the comparison with BP instead")
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
    if options.again:
        results = predicted_again(options.model, options.json)
    else:
        results = run_cases(options.model, options.only, options.json)
    print(table(results))
    good = sum(map(holds, results))
    promise = "measured <= predicted <= 1.25 x measured, for each process and all together"
    print(f"\n{good} of {len(results)} plans hold: {promise}")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
