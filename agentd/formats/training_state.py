"""The file in which a training is parked: what it is a part of, where it is, and numbers in named sections.

A line that names the format; the length of the header (8 bytes, little-endian); the header, a JSON object whose
`sections` are names and sizes; the sections' bytes in that order; SHA-256 of everything before it. Reading begins with
that: a file of which a power cut has taken a part is told from a whole one before anything of it is used.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.durable import replacement

Buffer = bytes | memoryview
_MAGIC = b"agentd training state 1\n"
_LENGTH = struct.Struct("<Q")
_DIGEST = hashlib.sha256().digest_size
_CHUNK = 1 << 18  # bytes in memory at a time


@dataclass(frozen=True)
class StateSection:
    """`parts` are `size` bytes together; they are asked for when they are written."""

    name: str
    size: int
    parts: Iterable[Buffer]


def part_of_file(name: str, path: Path) -> StateSection:
    """A section with the bytes of a file."""

    def parts() -> Iterable[bytes]:
        with path.open("rb") as file:
            while part := file.read(_CHUNK):
                yield part

    return StateSection(name, path.stat().st_size, parts())


def write(path: Path, header: Mapping[str, Any], sections: Sequence[StateSection]) -> None:
    """Replaces `path`: after a power cut it is this state as a whole, or the one before. Raises OSError."""
    tree = json.dumps({**header, "sections": [[each.name, each.size] for each in sections]}).encode()
    head = StateSection("header", len(_MAGIC) + _LENGTH.size + len(tree), [_MAGIC, _LENGTH.pack(len(tree)), tree])
    digest = hashlib.sha256()
    with replacement(path) as temporary, temporary.open("xb") as file:
        for section in (head, *sections):
            begin = file.tell()
            for part in section.parts:
                digest.update(part)
                file.write(part)
            if file.tell() - begin != section.size:
                raise OSError(f"{section.name} has not {section.size} bytes")
        file.write(digest.digest())


@dataclass(frozen=True)
class TrainingState:
    """A whole file. `header` is what `write` was given."""

    path: Path
    header: dict[str, Any]
    places: dict[str, tuple[int, int]]
    """By section: where it begins, and its size."""

    @classmethod
    def read(cls, path: Path) -> "TrainingState":
        """Raises FileNotFoundError, ValueError for a file that is damaged or is none, OSError."""
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path.name} is no training state of this version")
            file.seek(0)
            left = size - _DIGEST
            while left > 0 and (part := file.read(min(left, _CHUNK))):
                digest.update(part)
                left -= len(part)
            if left or file.read() != digest.digest():
                raise ValueError(f"{path.name} is damaged: its checksum does not match")
            file.seek(len(_MAGIC))
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = json.loads(file.read(length))
        places, at = {}, len(_MAGIC) + _LENGTH.size + length
        for name, n in header.pop("sections"):
            places[name] = at, n
            at += n
        return cls(path, header, places)

    def read_into(self, name: str, buffer: memoryview) -> None:
        """A section of the size of the buffer. Raises ValueError where there is none, OSError."""
        at, size = self._place(name)
        if buffer.nbytes != size:
            raise ValueError(f"{self.path.name} has {size} bytes of {name}, not {buffer.nbytes}")
        with self.path.open("rb") as file:
            file.seek(at)
            if file.readinto(buffer) != size:
                raise ValueError(f"{self.path.name} ends in the middle of {name}")

    def extract(self, name: str, path: Path) -> None:
        """Writes a section into a file of its own. Raises ValueError where there is none, OSError."""
        at, left = self._place(name)
        with self.path.open("rb") as file, replacement(path) as temporary, temporary.open("xb") as out:
            file.seek(at)
            while left > 0 and (part := file.read(min(left, _CHUNK))):
                out.write(part)
                left -= len(part)

    def _place(self, name: str) -> tuple[int, int]:
        if name not in self.places:
            raise ValueError(f"{self.path.name} has no {name}")
        return self.places[name]
