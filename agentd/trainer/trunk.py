"""The frozen trunk, run here instead of in the engine: what enters the first trained block, once for all examples.

Where the processor multiplies bfloat16 this takes a fraction of the time the engine needs to dequantise and multiply.
The states differ from the engine's by its 8-bit rounding of activations alone. A block is in memory at a time, and the
states are in the tap file, where training reads them as it reads the engine's.
"""

from collections.abc import Callable

import torch
from torch import nn

from agentd import allocator, code_pages
from agentd.errors import TrainerFailed
from agentd.trainer.blocks import Blocks
from agentd.trainer.gguf_file import GGUFFile
from agentd.trainer.lora import adopt, read_adapter, read_control
from agentd.trainer.shortcuts import Suffix
from agentd.trainer.spec import Spec
from agentd.trainer.tap import Tap, batches, shares_well

_MICRO_TOKENS = 384  # nothing is kept for a backward pass, so there is no reason for fewer
_EMBEDDINGS = "token_embd.weight"
_PIECE = 1024  # rows embedded at once


def run(spec: Spec, on_block: Callable[[int, int], None], parked: Callable[[], bool] = lambda: False) -> bool:
    """Writes the tap file of `spec`, a row for each of its tokens; tells how many of how many blocks are done.

    Returns whether all of them are: `parked` is asked after each, and nothing goes on once it is true.
    Raises TrainerFailed and ModelUnusable.
    """
    assert spec.tokens is not None
    options, first = spec.train, spec.first_block
    file = GGUFFile(spec.model)
    control = read_control(spec.control, spec.n_embd) if spec.control else None
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    blocks = Blocks(file, 0, first, control, resident=False, dtype=dtype)
    if spec.initial:
        adopt(blocks, read_adapter(spec.initial))
    suffix = Suffix(blocks, shares_well(spec.examples, spec.prefix.n, _MICRO_TOKENS), scored_rows=False)
    _embed(blocks, spec)
    tap = Tap(spec.tap, spec.n_embd, spec.prefix, writable=True)
    tap.check(spec.examples)
    parts = batches(spec.examples, spec.prefix.n, _MICRO_TOKENS, suffix.shares_prefix)
    allocator.while_training()
    code_pages.forget()
    with torch.no_grad():
        for block in range(first):
            blocks.activate(block)
            prefix = tap.prefix()
            after = prefix
            for batch in parts:
                own, *shared = suffix.all_rows(prefix, tap.inputs(batch))
                tap.replace(batch, own)
                after = shared[0] if shared else after
            tap.replace_prefix(after)
            on_block(block + 1, first)
            if parked():
                return False
    del blocks, suffix
    allocator.give_back()
    allocator.while_building()
    return True


def _embed(blocks: Blocks, spec: Spec) -> None:
    """What enters block 0. The model's own module embeds, because some scale what they look up."""
    file, own = blocks.file, blocks.model.get_input_embeddings()
    if _EMBEDDINGS not in file.tensors or file.shape(_EMBEDDINGS)[1] != spec.n_embd:
        raise TrainerFailed(f"{spec.model} has no embeddings of {spec.n_embd} dimensions")
    n_vocab = file.shape(_EMBEDDINGS)[0]
    tokens = torch.tensor(spec.tokens)
    if int(tokens.max()) >= n_vocab:
        raise TrainerFailed(f"token {int(tokens.max())} is beyond the vocabulary of {n_vocab}")
    try:
        with spec.tap.open("wb") as out, torch.no_grad():
            for begin in range(0, len(tokens), _PIECE):
                part = file.rows(_EMBEDDINGS, tokens[begin : begin + _PIECE])
                own.weight = nn.Parameter(part, requires_grad=False)
                out.write((own(torch.arange(len(part))) / blocks.entry).numpy().tobytes())
    except OSError as error:
        raise TrainerFailed(f"{spec.tap}: {error.strerror or error}") from None
