"""A model in torch, and movie reviews as its batches: for the benchmarks `methods` and `gradient`."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from agentd.host import allocator
from tools.bench.elastic_tasks import Task

THREADS, BATCH = 2, 16
_MULTIPLE = 8  # lengths are padded to a multiple of this: few shapes, for which oneDNN compiles its code once

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load(path: Path, dtype: str) -> Any:
    """A causal LM in eval mode from a GGUF file or a directory of transformers, what loading left behind given back."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(THREADS)
    allocator.while_building()
    model = AutoModelForCausalLM.from_pretrained(*_place(path), **_file(path), dtype=DTYPES[dtype]).eval()
    allocator.while_training()
    return model


def _place(path: Path) -> tuple[Path]:
    return (path if path.is_dir() else path.parent,)


def _file(path: Path) -> dict[str, str]:
    return {} if path.is_dir() else {"gguf_file": path.name}


class Reviews:
    """The training rows of a task as padded batches."""

    def __init__(self, model: Any, path: Path, task: Task, seed: int) -> None:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(*_place(path), **_file(path))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._answers = [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in task.answers]
        self.train = task.train
        self._tokens = {prompt: tokenizer(prompt).input_ids for prompt, _ in task.train}

    def loss(self, number: int) -> Callable[[], Tensor]:
        """The answers' cross-entropy on mini-batch `number`: epochs in shuffled order, the same for the same seed."""
        epoch, place = divmod(number, len(self.train) // BATCH)
        order = random.Random(f"{self._seed}/{epoch}").sample(self.train, len(self.train))
        rows = order[place * BATCH : (place + 1) * BATCH]
        batch, right = self._batch(rows), torch.tensor([answer for _, answer in rows])
        return lambda: cross_entropy(self._scores(batch), right)

    def _batch(self, rows: list[tuple[str, int]]) -> Any:
        encoded = {"input_ids": [self._tokens[prompt] for prompt, _ in rows]}
        return self._tokenizer.pad(encoded, return_tensors="pt", pad_to_multiple_of=_MULTIPLE)

    def _scores(self, batch: Any) -> Tensor:
        logits: Tensor = self._model(**batch, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1, self._answers].float()
