"""A model's weights on disk as they are served: safetensors files, mapped into memory.

What serves is mapped for reading. Its pages are clean and belong to a file, so the kernel, or `release`, may take them
away at any time, and they come back when they are touched. A candidate that learns in place is a second mapping of the
same file, private and copy-on-write: memory of its own grows by the pages that are written, and by nothing else.

An image written here is one file with all parameters in the model's order, whose name is the sha256 of their bytes.
"""

import hashlib
import mmap
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from agentd.durable import replacement
from agentd.formats.safetensors_file import header
from agentd.formats.safetensors_header import read_table

T = TypeVar("T")

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PAGE = 4096  # the data begin on a page, so that no page holds more than weights
_CHUNK = 8 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Part:
    """A tensor's place: `offset` in bytes from the beginning of file number `file`."""

    name: str
    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        n = self.dtype.itemsize
        for dimension in self.shape:
            n *= dimension
        return n


@dataclass(frozen=True)
class Image:
    """Files and the tensors in them, in the model's order."""

    files: tuple[Path, ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(part.size for part in self.parts)

    def open(self, access: int = mmap.ACCESS_READ) -> "Mapped":
        """The tensors. mmap.ACCESS_COPY: what is written stays in memory; ACCESS_WRITE: it goes to the file."""
        return Mapped(self, access)


class Mapped:
    """An image in memory. Dropping the last reference to its tensors gives everything back."""

    def __init__(self, image: Image, access: int) -> None:
        self.image, self._access = image, access
        self._maps: list[mmap.mmap] = []
        for path in image.files:
            with path.open("r+b" if access == mmap.ACCESS_WRITE else "rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=access))
        self.tensors: dict[str, torch.Tensor] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a buffer for reading must not be written
            for part in image.parts:
                count = part.size // part.dtype.itemsize
                flat = torch.frombuffer(self._maps[part.file], dtype=part.dtype, count=count, offset=part.offset)
                self.tensors[part.name] = flat.view(part.shape)

    def release(self) -> None:
        """Gives the pages back; they are read again when they are touched. What is private has nowhere to go."""
        if self._access != mmap.ACCESS_COPY:
            for mapping in self._maps:
                mapping.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Has what was written on its way to the files."""
        for mapping in self._maps:
            mapping.flush()

    def digesting(self) -> Generator[None, None, str]:
        """Returns the sha256 of all tensors' bytes, in order; yields now and then."""
        digest = hashlib.sha256()
        for part in self.image.parts:
            view = memoryview(self._maps[part.file])[part.offset : part.offset + part.size]
            for start in range(0, part.size, _CHUNK):
                digest.update(view[start : start + _CHUNK])
                self.release()  # what was read need not stay
                yield
        return digest.hexdigest()


def digest(mapped: Mapped) -> str:
    """sha256 of all tensors' bytes, in order."""
    return finished(mapped.digesting())


def finished(steps: Generator[Any, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            value: T = stop.value
            return value


def create(path: Path, shapes: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> Image:
    """Makes a file with room for these tensors, all zero and without blocks on the disk yet."""
    parts = [Part(name, 0, 0, shape, dtype) for name, shape, dtype in shapes]
    entries = [(part.name, _NAMES[part.dtype], part.shape, part.size) for part in parts]
    begin = header(entries, {"format": "pt"}, align=_PAGE)
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + sum(part.size for part in parts))
    path.chmod(0o600)
    return read([path])


def copy(source: Mapped, path: Path) -> Iterator[None]:
    """Writes the tensors of an image into a new file, yielding now and then."""
    image = create(path, ((part.name, part.shape, part.dtype) for part in source.image.parts))
    with path.open("r+b") as file:
        for old, new in zip(source.image.parts, image.parts, strict=True):
            view = memoryview(source._maps[old.file])[old.offset : old.offset + old.size]
            file.seek(new.offset)
            for start in range(0, old.size, _CHUNK):
                file.write(view[start : start + _CHUNK])
                source.release()  # what is copied need not stay
                yield


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors to a file that is there as a whole or not at all."""
    shapes = ((name, tuple(each.shape), each.dtype) for name, each in tensors.items())
    with replacement(path) as temporary:
        mapped = create(temporary, shapes).open(mmap.ACCESS_WRITE)
        for name, tensor in tensors.items():
            mapped.tensors[name].copy_(tensor)
        mapped.flush()


def read(paths: Iterable[Path]) -> Image:
    """The tensors of safetensors files, as far as their types can be served. Raises ModelUnusable."""
    files, parts = tuple(paths), []
    for number, path in enumerate(files):
        table = read_table(path)
        for name, facts in table.tensors.items():
            dtype = _DTYPES.get(facts["dtype"])
            if dtype is not None:
                offset = table.data + facts["data_offsets"][0]
                parts.append(Part(name, number, offset, tuple(facts["shape"]), dtype))
    return Image(files, tuple(parts))


def arranged(image: Image, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Image | None:
    """The image restricted to these tensors, in this order; None where one is missing or is stored otherwise."""
    known = {part.name: part for part in image.parts}
    parts = []
    for name, shape in shapes.items():
        part = known.get(name)
        if part is None or part.shape != shape or part.dtype != dtype or part.offset % dtype.itemsize:
            return None
        parts.append(part)
    return Image(image.files, tuple(parts))
