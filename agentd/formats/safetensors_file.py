"""Safetensors files as bytes that are moved about: standard library only, nothing is computed with."""

import json
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentd.durable import new_file
from agentd.formats.safetensors_header import read_table

_CHUNK = 1 << 20


def names(path: Path) -> list[str]:
    """The tensors in a file, in its order. Raises ModelUnusable."""
    return list(read_table(path).tensors)


def header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None, *, align: int = 8
) -> bytes:
    """The beginning of a file whose tensors follow one after the other, each as (name, dtype, shape, bytes).

    The data begin at a multiple of `align` bytes. Equal arguments give equal bytes.
    """
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, size in tensors:
        begin, end = end, end + size
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text


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


def extract(source: Path, names: Collection[str], target: Path) -> None:
    """Writes those tensors of `source` into a file of their own, in the same order, and syncs it.

    Raises ModelUnusable, and ValueError where one is missing.
    """
    table = read_table(source)
    if missing := sorted(set(names) - set(table.tensors)):
        raise ValueError(f"{source.name} has no tensor {missing[0]}")
    chosen = {name: facts for name, facts in table.tensors.items() if name in names}
    places = {name: facts["data_offsets"] for name, facts in chosen.items()}
    with source.open("rb") as old, new_file(target) as new:
        new.write(
            header(
                (name, facts["dtype"], facts["shape"], places[name][1] - places[name][0])
                for name, facts in chosen.items()
            )
        )
        for begin, end in places.values():
            old.seek(table.data + begin)
            for start in range(begin, end, _CHUNK):
                new.write(old.read(min(_CHUNK, end - start)))
