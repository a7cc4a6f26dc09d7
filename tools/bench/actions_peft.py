"""PEFT's LoRA on tokens that agentd made, as anybody would run it: all linear layers, r = 8, the model in float32.

    python -m tools.bench actions-peft MODEL.gguf TOKENS.jsonl ADAPTER.gguf SEED LR EPOCHS [DEVICE]

Sixteen examples a step, four at a time; AdamW, a warm-up and a cosine; the loss is the mean over the tokens of the
assistant's part. The last line printed says what it took, as JSON: the peak is the process's proportional set size,
read every 50 ms; `seconds` count from the first step, `whole` from the start of the process.
"""

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.functional import cross_entropy

from agentd.host import memory
from agentd.learn.encoded import Encoded
from agentd.revision.archive import AdapterArchive
from agentd.revision.files import ADAPTER
from tools.daemon import ROOT, ToolFailed

BATCH, AT_ONCE, RANK, SCALE = 16, 4, 8, 2
Row = tuple[list[int], list[int]]
"""The tokens that are fed, and those of the answer, of which the last is predicted and not fed."""


def train(model: Path, tokens: Path, adapter: Path, seed: int, lr: float, epochs: int, device: str) -> dict[str, Any]:
    """Runs this module in a process of its own. Raises ToolFailed."""
    arguments = [str(each) for each in (model, tokens, adapter, seed, lr, epochs, device)]
    command = [sys.executable, "-m", __name__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ToolFailed(f"PEFT ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def archived(adapter: Path, sha256: str, path: Path) -> bytes:
    """The adapter as `POST /admin/import` takes it, for the base with this sha256."""
    with path.open("xb") as out:
        AdapterArchive(sha256, "peft-lora", 0, 0).write(out, {ADAPTER: adapter})
    return path.read_bytes()


def row_of(example: Encoded) -> Row:
    """Raises ValueError for an example that has no single answer."""
    (sequence,) = example.sequences
    answer = [token for _, _, token in example.target]
    fed = len(sequence) - len(answer) + 1
    if [(s, p) for s, p, _ in example.target] != [(0, fed - 1 + i) for i in range(len(answer))]:
        raise ValueError("the answer is not the end of the example")
    return sequence, answer


def batches(rows: Sequence[Row], epochs: int, seed: int) -> Iterator[list[Row]]:
    """A step's examples; what is left of an epoch makes a smaller step."""
    chance = random.Random(seed)
    for _ in range(epochs):
        order = chance.sample(list(rows), len(rows))
        yield from (order[i : i + BATCH] for i in range(0, len(order), BATCH))


def loss_of(model: Any, rows: Sequence[Row], pad: int, device: str) -> torch.Tensor:
    """The sum of the losses of all answers' tokens; rows are padded on the left, so that answers end together."""
    width, answer_width = max(len(fed) for fed, _ in rows), max(len(answer) for _, answer in rows)
    ids = torch.tensor([[pad] * (width - len(fed)) + fed for fed, _ in rows], device=device)
    mask = torch.tensor([[0] * (width - len(fed)) + [1] * len(fed) for fed, _ in rows], device=device)
    right = torch.tensor([[-100] * (answer_width - len(answer)) + answer for _, answer in rows], device=device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=answer_width
    ).logits
    return cross_entropy(logits.float().flatten(0, 1), right.flatten(), ignore_index=-100, reduction="sum")


def main() -> int:
    if len(sys.argv) < 7:
        print(__doc__)
        return 2
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
    from transformers.utils import logging

    from agentd.engine.transformers.exporting import write_gguf

    logging.disable_progress_bar()
    path, source, target = map(Path, sys.argv[1:4])
    seed, lr, epochs = int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
    device = sys.argv[7] if len(sys.argv) > 7 else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(seed)
    rows = [row_of(Encoded.from_json(json.loads(line))) for line in source.read_text().splitlines()]
    base: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    pad = base.config.eos_token_id if isinstance(base.config.eos_token_id, int) else 0  # masked: any token will do
    lora = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora).to(device)

    peak, meter, stop = 0, memory.Meter(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, meter.read(os.getpid()) or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = epochs * math.ceil(len(rows) / BATCH)
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    model.train()
    losses = []
    for step in batches(rows, epochs, seed):
        n = sum(len(answer) for _, answer in step)
        total = 0.0
        for i in range(0, len(step), AT_ONCE):
            loss = loss_of(model, step[i : i + AT_ONCE], pad, device) / n
            torch.autograd.backward(loss)
            total += loss.item()
        losses.append(total)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - started
    stop.set()
    watcher.join()
    factors = {
        name.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight.detach().cpu(),
            SCALE * layer.lora_B["default"].weight.detach().cpu(),
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    write_gguf(path, model.unload(), factors, target)
    whole = time.time() - psutil.Process().create_time()
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "whole": round(whole, 1),
                "peak_bytes": peak if device == "cpu" else None,
                "losses": [round(losses[0], 4), round(losses[-1], 4)],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
