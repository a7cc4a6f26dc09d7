"""Backpropagation through the whole model in plain torch, to compare its memory with. One process, one measurement.

    python -m tools.bench backprop MODEL.gguf EXAMPLES.jsonl lora|full

`lora` trains rank-8 matrices on every linear layer of every block, as PEFT's `all-linear` does; `full` every parameter.
float32, AdamW, one batch of 16 padded examples a step. Prints {"peak_bytes", "seconds", "loss"} as its last line.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agentd.host import memory

BATCH, STEPS, RANK, THREADS = 16, 2, 8, 2


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + (x @ self.a.T) @ self.b.T * 2.0
        return out


def add_lora(model: nn.Module) -> None:
    """Freezes the model and puts LoRA on every linear layer but the head."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(module))


def batch_of(tokenizer: Any, lines: list[str]) -> dict[str, torch.Tensor]:
    texts = []
    for line in lines:
        example = json.loads(line)
        messages = [*example["input"]["messages"], {"role": "assistant", "content": example["target"]}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch: dict[str, torch.Tensor] = tokenizer(texts, return_tensors="pt", padding=True)
    return batch


def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, source, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    peak = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, memory.pss(os.getpid()) or 0)

    torch.set_num_threads(THREADS)
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if kind == "lora":
        add_lora(model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    lines = source.read_text().splitlines()
    watcher = threading.Thread(target=watch)
    watcher.start()  # after loading: what the loader leaves behind is not BP's
    started, loss = time.monotonic(), torch.zeros(())
    for step in range(STEPS):
        batch = batch_of(tokenizer, lines[step * BATCH : (step + 1) * BATCH])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stop.set()
    watcher.join()
    print(json.dumps({"peak_bytes": peak, "seconds": time.monotonic() - started, "loss": loss.item()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
