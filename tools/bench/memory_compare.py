"""The headline: the same examples and the same batch, from plain serving to backpropagation through everything."""

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agentd.adapt.planning.dataset import Dataset
from agentd.budget.footprint import MIB, daemon_terms, engine_terms, serving_terms, total
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.workload import Workload
from tools.bench.memory_runs import Case, examples, measure

AGENTD = {
    "MeZO": Case("mezo", 0),
    "ElasticZO, k=1": Case("elasticzo", 1),
    "ElasticZO, k=4": Case("elasticzo", 4),
    "BP in 16 of 30 blocks": Case("suffix-bp", 16),
    "BP in every block, one in memory": Case("blockwise-bp", 30),
}


def compare(model: Path) -> list[dict[str, Any]]:
    """Peak memory of everything that runs, in bytes, from plain serving to full BP."""
    rows: list[dict[str, Any]] = []
    serving = 0
    for name, case in AGENTD.items():
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(model, case, Path(folder)))
        if not rows:
            serving = result["serving"]
            rows.append({"what": "plain serving", "bytes": serving, "beyond": 0})
        added = result["measured"]["together"]
        rows.append({"what": f"agentd, {name}", "bytes": result["serving"] + added, "beyond": added})
    for kind, name in (("lora", "LoRA r=8 on every linear layer, BP, fp32"), ("full", "full BP, AdamW, fp32")):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "examples.jsonl"
            Dataset(examples(Case("mezo", 0)), {}).write(source)
            command = [sys.executable, "-m", "tools.bench.paper.backprop", str(model), str(source), kind]
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
    ModelShapes.dense("1.1B", n_layer=22, n_embd=2048, n_head=32, n_head_kv=4, n_ff=5632, n_vocab=32000, bits=4.5),
    ModelShapes.dense("7B", n_layer=32, n_embd=4096, n_head=32, n_head_kv=32, n_ff=11008, n_vocab=32000, bits=4.5),
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
