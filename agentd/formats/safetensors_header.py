"""Reads the header of a safetensors file: the names, types and places of its tensors, and its metadata.

Standard library only, for the daemon; a file that is cut short, damaged or something else raises ModelUnusable and
nothing else. The format: eight bytes with the length of a JSON header, the header, the tensors.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.errors import ModelUnusable

_MAX_HEADER = 100 << 20  # bytes


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file does; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            beginning = file.read(9)
    except OSError:
        return False
    return len(beginning) == 9 and beginning[8:] == b"{" and struct.unpack("<Q", beginning[:8])[0] <= _MAX_HEADER


@dataclass(frozen=True)
class Table:
    """What a safetensors file holds: {name: {"dtype", "shape", "data_offsets"}}, its metadata, and where data begin."""

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data: int


def read_table(path: Path) -> Table:
    """The header of the safetensors file `path`. Raises ModelUnusable for anything else, or what is cut short."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ModelUnusable(path, "it is no safetensors file, or cut short")
            tree = json.loads(file.read(length))
    except OSError as error:
        raise ModelUnusable(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise ModelUnusable(path, "it is no safetensors file: its header is not JSON") from None
    try:
        metadata = tree.pop("__metadata__", {})
        ends = [tensor["data_offsets"][1] for tensor in tree.values()]
        missing = 8 + length + max(ends, default=0) - size
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ModelUnusable(path, "it is no safetensors file: its header has no table of tensors") from None
    if missing > 0:
        raise ModelUnusable(path, f"it is cut short: {missing} of {size + missing} bytes are missing")
    return Table(tree, metadata, 8 + length)
