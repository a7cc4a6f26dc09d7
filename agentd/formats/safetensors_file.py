"""Safetensors files in the daemon: bytes that are moved about, or multiplied. Standard library only."""

import json
import struct
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentd.durable import new_file, sync
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


def scale(path: Path, ending: str, factor: float) -> None:
    """Multiplies the float32 tensors whose names have this ending, in place: the file must not be a revision's yet.

    Raises ModelUnusable, and ValueError where a tensor is of another type or there is none.
    """
    table = read_table(path)
    chosen = [facts for name, facts in table.tensors.items() if name.endswith(ending)]
    if not chosen or any(facts["dtype"] != "F32" for facts in chosen):
        raise ValueError(f"{path.name} has no tensors *{ending}, or not in float32")
    with path.open("r+b") as file:
        for begin, end in (facts["data_offsets"] for facts in chosen):
            for start in range(begin, end, _CHUNK):
                file.seek(table.data + start)
                values = array("f", file.read(min(_CHUNK, end - start)))
                file.seek(table.data + start)
                file.write(array("f", [factor * value for value in values]))
        sync(file)
