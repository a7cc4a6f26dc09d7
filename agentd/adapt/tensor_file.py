"""Safetensors files as bytes that are moved about: standard library only, nothing is computed with."""

import json
import os
import struct
from collections.abc import Collection
from pathlib import Path

from agentd.safetensors_header import read_table

_CHUNK = 1 << 20


def names(path: Path) -> list[str]:
    """The tensors in a file, in its order. Raises ModelUnusable."""
    return list(read_table(path).tensors)


def check(data: bytes) -> None:
    """Raises ValueError where `data` is no whole safetensors file with tensors in it."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        table = json.loads(data[8 : 8 + length])
        ends = [facts["data_offsets"][1] for name, facts in table.items() if name != "__metadata__"]
        whole = bool(ends) and 8 + length + max(ends) == len(data)
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError("its tensors are no safetensors file, or cut short")


def extract(source: Path, wanted: Collection[str], target: Path) -> None:
    """Writes those tensors of `source` into a file of their own, in the same order, and syncs it.

    Raises ModelUnusable, and ValueError where one is missing.
    """
    table = read_table(source)
    if missing := sorted(set(wanted) - set(table.tensors)):
        raise ValueError(f"{source.name} has no tensor {missing[0]}")
    chosen = {name: facts for name, facts in table.tensors.items() if name in wanted}
    header, end = {}, 0
    for name, facts in chosen.items():
        begin, end = end, end + facts["data_offsets"][1] - facts["data_offsets"][0]
        header[name] = {**facts, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as old, target.open("xb") as new:
        os.fchmod(new.fileno(), 0o600)
        new.write(struct.pack("<Q", len(text)) + text)
        for facts in chosen.values():
            begin, end = facts["data_offsets"]
            old.seek(table.data + begin)
            for start in range(begin, end, _CHUNK):
                new.write(old.read(min(_CHUNK, end - start)))
        new.flush()
        os.fsync(new.fileno())
