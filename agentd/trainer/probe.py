"""Whether a model's blocks can be trained here, from its metadata alone: no weights are read."""

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from agentd.host import page_cache
from agentd.host.cpu import multiplies_bf16
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.meta_model import IdentityBlock, MetaModel, Unsupported


def probe(path: Path) -> dict[str, Any]:
    """The answer as the daemon gets it; `rank_1` counts the parameters of LoRA with rank 1 in the last block, and
    `runtime_bytes` is what this process takes: a trainer before its first step, which has forgotten what its start ran;
    `start_bytes` what it took at most until then.

    Raises ModelUnusable for a file that is no model.
    """
    file = GGUFFile(path)
    header = file.header
    reason, parameters = None, 0
    try:
        parameters = _rank_1_parameters(file)
    except Unsupported as error:
        reason = error.reason
    return {
        "supported": reason is None,
        "reason": reason,
        "architecture": header.architecture,
        "blocks": header.block_count,
        "hidden_size": header.embedding_length,
        "trainable_per_block": {"rank_1": parameters},
        "bf16": multiplies_bf16(),
        "start_bytes": _memory("VmHWM"),
        "runtime_bytes": _settled(),
    }


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
