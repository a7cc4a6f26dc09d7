"""Whether a model's blocks can be trained here, from its metadata alone: no weights are read."""

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from agentd.errors import TrainerFailed
from agentd.host import page_cache
from agentd.host.cpu import multiplies_bf16
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.meta_model import IdentityBlock, MetaModel, Unsupported


def probe(path: Path, sample: Path | None = None) -> dict[str, Any]:
    """The answer as the daemon gets it.

    most_blocks          last blocks that compute what the engine computes, by `sample` (agreement.py); without one all
    reason               why none can be trained, or which block computes something else
    cosines              of the comparison, None without one
    trunk, backward      tokens per second through one block, as agreement.py times them; with a sample alone
    load                 weights per second out of the file, likewise
    trainable_per_block  `rank_1` counts the parameters of LoRA with rank 1 in the last block
    runtime_bytes        what this process takes: a trainer before its first step, its start's code given back
    start_bytes          what it took at most until then

    Raises ModelUnusable for a file that is no model.
    """
    file = GGUFFile(path)
    header = file.header
    reason, parameters = None, 0
    try:
        parameters = _rank_1_parameters(file)
    except Unsupported as error:
        reason = error.reason
    answer = {
        "supported": reason is None,
        "reason": reason,
        "most_blocks": header.block_count if reason is None else 0,
        "cosines": None,
        "architecture": header.architecture,
        "blocks": header.block_count,
        "hidden_size": header.embedding_length,
        "trainable_per_block": {"rank_1": parameters},
        "bf16": multiplies_bf16(),
        "start_bytes": _memory("VmHWM"),
        "runtime_bytes": _settled(),
    }
    if sample is not None and reason is None:
        answer |= _compared(file, sample)
    return answer


def _compared(file: GGUFFile, sample: Path) -> dict[str, Any]:
    from agentd.trainer.agreement import compare

    try:
        agreement = compare(file, sample)
    except TrainerFailed as error:
        return {"supported": False, "reason": getattr(error, "reason", str(error)), "most_blocks": 0}
    most = len(agreement.cosines) - agreement.first
    cosines = [round(cosine, 4) for cosine in agreement.cosines]
    answer = {"supported": most > 0, "reason": agreement.reason, "most_blocks": most, "cosines": cosines}
    return {**answer, **agreement.speeds}


def _settled() -> int | None:
    page_cache.forget()
    return _memory("VmRSS")


def _memory(what: str) -> int | None:
    """Bytes that this process has in memory (VmRSS) or had at most (VmHWM); None where the kernel does not tell.

    getrusage(2) would count what the process that started this one had at that moment.
    """
    with contextlib.suppress(OSError):
        if match := re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    return None


def _rank_1_parameters(file: GGUFFile) -> int:
    frame = MetaModel(file)
    last = frame.n_blocks - 1
    for i in range(last):
        frame.blocks[i] = IdentityBlock(frame.blocks[i])
    total = 0
    for tensor in file.tensors:
        if tensor.startswith(f"blk.{last}.") and tensor.endswith(".weight") and tensor in frame.tensors.names:
            stored = np.broadcast_to(np.float32(0), file.shape(tensor))
            converted = frame.tensors.convert(tensor, stored, {})
            module = frame.module.get_submodule(frame.tensors.names[tensor].rpartition(".")[0])
            if converted is not None and converted[1] is stored and isinstance(module, nn.Linear):
                total += sum(file.shape(tensor))
    if not total:
        raise Unsupported(file.path, "none of its matrices can be trained")
    return total
