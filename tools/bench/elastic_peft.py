"""PEFT's LoRA as anybody would run it: all linear layers, r = 8, the whole model in torch.

    python -m tools.bench elastic-peft MODEL.gguf TASK.json fp32|bf16 SEED LR EPOCHS

TASK.json holds {"answers", "train", "judged"}. The last line printed is the result as JSON; the peak is the process's
proportional set size, read every 50 ms while it trains, and its time counts from the first step; `start_seconds` is how
long the process took to get there.
"""

import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.functional import cross_entropy

from agentd.host import memory

BATCH, RANK, THREADS = 16, 8, 2


def main() -> int:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, source, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    seed, lr, epochs = int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    task = json.loads(source.read_text())
    answers = [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in task["answers"]]

    def logits(rows: list[Any]) -> torch.Tensor:
        batch = tokenizer([prompt for prompt, _ in rows], return_tensors="pt", padding=True)
        out: torch.Tensor = model(**batch, use_cache=False).logits[:, -1, answers].float()
        return out

    def judge(rows: list[Any]) -> tuple[float, float]:
        with torch.no_grad():
            ordered = sorted(rows, key=lambda row: len(row[0]))
            parts = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
            scores = torch.cat([logits(part) for part in parts])
        right = torch.tensor([row[1] for row in ordered])
        return (scores.argmax(1) == right).float().mean().item(), cross_entropy(scores, right).item()

    peak, meter = 0, memory.Meter()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, meter.read(os.getpid()) or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, start_seconds = time.monotonic(), time.time() - psutil.Process().create_time()
    chance, train = random.Random(seed), task["train"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    per_epoch = len(train) // BATCH
    steps = per_epoch * epochs
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    model.train()
    for step in range(steps):
        if step % per_epoch == 0:
            rows = chance.sample(train, len(train))
        part = rows[step % per_epoch * BATCH :][:BATCH]
        loss = cross_entropy(logits(part), torch.tensor([right for _, right in part]))
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - started
    stop.set()
    watcher.join()
    model.eval()
    accuracy, loss_after = judge(task["judged"])
    times = {"seconds": seconds, "start_seconds": start_seconds}
    print(json.dumps({"accuracy": accuracy, "loss": loss_after, **times, "peak_bytes": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
