"""The frozen trunk, run here instead of in the engine: what enters the first trained block, once for all examples.

Where the processor multiplies bfloat16 this takes a fraction of the time the engine needs to dequantise and multiply.
The states differ from the engine's by its 8-bit rounding of activations alone. A block is in memory at a time, and the
states are in the tap file, where training reads them as it reads the engine's.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from agentd.errors import TrainerFailed
from agentd.host import allocator, page_cache
from agentd.limits import MICRO_MOST
from agentd.nn.blocks import Blocks
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.lora_blocks import adopt, read_adapter, read_control
from agentd.trainer.batches import Layout, batches
from agentd.trainer.shortcuts import Suffix
from agentd.trainer.spec import Spec, TrainOptions
from agentd.trainer.tap_file import TapFile

_EMBEDDINGS = "token_embd.weight"
_PIECE = 1024  # rows embedded at once


def run(spec: Spec, on_block: Callable[[int, int], None], parked: Callable[[], bool] = lambda: False) -> bool:
    """Writes the tap file of `spec`, a row for each token of its examples; tells how many of how many blocks are done.

    Returns whether all of them are: `parked` is asked after each, and nothing goes on once it is true.
    Raises TrainerFailed and ModelUnusable.
    """
    options, first = spec.options, spec.first_block
    file = GGUFFile(spec.model)
    control = read_control(spec.control, file.header.embedding_length) if spec.control else None
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    blocks = Blocks(file, 0, first, control, in_memory=False, dtype=dtype, streamed=options.streamed)
    if spec.initial:
        adopt(blocks, read_adapter(spec.initial))
    suffix = Suffix(blocks, scored_rows=False)
    _embed(blocks, spec)
    layout = Layout.in_order(spec.examples, spec.prefix)
    tap = TapFile(spec.tap, blocks.n_embd, layout, writable=True)
    tap.check(spec.examples)
    parts = batches(spec.examples, spec.prefix, at_once(options), suffix.shares)
    allocator.while_training()
    page_cache.forget()
    with torch.no_grad():
        for block in range(first):
            blocks.activate(block)
            for batch in parts:
                tree = replace(batch).tree  # made anew: all batches' masks together would be larger than a block
                after = suffix.all_rows(tap.inputs(batch), tree)
                tap.replace(batch, after)
            tap.replace_prefix(after[0, : spec.prefix])
            on_block(block + 1, first)
            if parked():
                return False
    del blocks, suffix
    allocator.give_back()
    allocator.while_building()
    return True


def at_once(options: TrainOptions) -> int:
    """Tokens of a forward pass. Nothing is kept for a backward pass, so there is no reason for fewer than usual; where
    training takes more, because every pass computes a long prefix again, there is the same reason here."""
    return max(MICRO_MOST, options.micro_tokens)


def _embed(blocks: Blocks, spec: Spec) -> None:
    """What enters block 0. The model's own module embeds, because some scale what they look up."""
    file, own = blocks.file, blocks.model.get_input_embeddings()
    if _EMBEDDINGS not in file.tensors or file.shape(_EMBEDDINGS)[1] != blocks.n_embd:
        raise TrainerFailed(f"{spec.model} has no embeddings of {blocks.n_embd} dimensions")
    n_vocab = file.shape(_EMBEDDINGS)[0]
    rows = spec.examples[0].encoded.shared[: spec.prefix]
    for encoded in (example.encoded for example in spec.examples):
        rows += [*encoded.shared[spec.prefix :], *itertools.chain(*encoded.own)]
    tokens = torch.tensor(rows)
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
