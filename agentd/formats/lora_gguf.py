"""The one thing the daemon changes in an adapter file: how much of it is applied."""

import struct
from pathlib import Path

from agentd import durable
from agentd.errors import PassFailed

_KEY = b"adapter.lora.alpha"
_FLOAT32 = 6  # GGUF's type of the value
_HEADER = 1 << 16  # bytes in which the key must lie


def scale(path: Path, factor: float) -> float:
    """Multiplies the LoRA alpha of the GGUF adapter `path`, which scales its whole effect; returns the new alpha.

    The four bytes of the value are written in place: the file must not be a revision's yet. Raises PassFailed.
    """
    mark = struct.pack("<Q", len(_KEY)) + _KEY + struct.pack("<I", _FLOAT32)
    with path.open("r+b") as file:
        head = file.read(_HEADER)
        at = head.find(mark)
        if at < 0 or head.count(mark) != 1 or len(head) < at + len(mark) + 4:
            raise PassFailed(f"{path.name} does not name its alpha as an adapter of agentd does")
        (alpha,) = struct.unpack_from("<f", head, at + len(mark))
        file.seek(at + len(mark))
        file.write(struct.pack("<f", alpha * factor))
        durable.sync(file)
    return float(alpha * factor)
