"""A GGUF file as torch tensors: only what is asked for is read, and dequantised in pieces."""

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch

from agentd.errors import ModelUnusable
from agentd.formats.gguf_header import Tensor, read_header
from agentd.nn.dequantise import Bytes, dequantise

_PIECE = 1 << 19  # weights that a thread dequantises at once: 2 MB in float32
_ALONE = 1 << 17  # fewer are dequantised sooner than another thread is there


class GGUFFile:
    """Raises ModelUnusable for a file that is missing, damaged or cut short, whenever that is found.

    The file is read piece by piece, not mapped: pages of a mapping would count as this process's memory until they are
    given back, and take longer to come and go than to be copied.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in self.header.tensors}
        self._files: list[int] = []
        for file in self.header.files:
            try:
                self._files.append(os.open(file, os.O_RDONLY))
            except OSError as error:
                raise ModelUnusable(file, error.strerror or str(error)) from None
            weakref.finalize(self, os.close, self._files[-1])
        self._space = threading.local()

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order, the contiguous dimension last."""
        return tuple(reversed(self.tensors[name].shape))

    def load(
        self, name: str, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None, rows: slice = slice(None)
    ) -> torch.Tensor:
        """The weights of `name` as (rows, columns), or any dimensions it has; into `out` where it is given.

        rows  only these, a slice with step 1
        """
        tensor = self.tensors[name]
        shape = self.shape(name)
        kind = gguf.GGMLQuantizationType[tensor.type]
        n = math.prod(shape[:-1])
        size = tensor.size // n
        begin, end, _ = rows.indices(n)
        if out is None:
            out = torch.empty(shape if end - begin == n else (end - begin, shape[-1]), dtype=dtype)
        target = out.view(-1, shape[-1])
        threads = torch.get_num_threads() if target.numel() >= _ALONE else 1
        step = max(1, min(_PIECE // shape[-1], -(-len(target) // threads)))

        def piece(first: int, part: torch.Tensor) -> None:
            raw = self._read(tensor, (begin + first) * size, len(part) * size)
            dequantise(raw.reshape(len(part), size), kind, part.numpy())

        for first in range(0, len(target), threads * step):
            pieces = target[first : first + threads * step]
            whole = pieces if pieces.dtype == torch.float32 else torch.empty(pieces.shape)
            _together([partial(piece, first + i, whole[i : i + step]) for i in range(0, len(whole), step)])
            if whole is not pieces:
                pieces.copy_(whole)
        return out

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Some rows of the matrix `name`, (indices, columns) in float32."""
        tensor = self.tensors[name]
        n, width = self.shape(name)
        size = tensor.size // n
        out = torch.empty(len(indices), width)
        raw = np.empty((len(indices), size), np.uint8)
        for i, row in enumerate(indices.tolist()):
            raw[i] = self._read(tensor, row * size, size)
        dequantise(raw, gguf.GGMLQuantizationType[tensor.type], out.numpy())
        return out

    def _read(self, tensor: Tensor, begin: int, size: int) -> Bytes:
        """`size` bytes from byte `begin` of a tensor, in memory that the thread's next call uses again. Raises
        ModelUnusable if the file has become shorter."""
        offset, path = tensor.offset + begin, self.header.files[tensor.shard]
        space: Bytes = getattr(self._space, "bytes", np.empty(0, np.uint8))
        if len(space) < size:
            self._space.bytes = space = np.empty(size, np.uint8)
        piece = space[:size]
        done = 0
        while done < size:
            try:
                read = os.preadv(self._files[tensor.shard], [piece[done:].data], offset + done)
            except OSError as error:
                raise ModelUnusable(path, error.strerror or str(error)) from None
            if not read:
                raise ModelUnusable(path, f"it ends before byte {offset + size}")
            done += read
        return piece

    def reader(self) -> SimpleNamespace:
        """What transformers' GGUF loader wants to see of a gguf.GGUFReader, without the vocabulary.

        The real reader makes an array of every token: 1.6 s and 166 MB for 49,152 of them.
        """
        fields = {key: _field(value) for key, value in self.header.metadata.items()}
        vocabulary = f"{self.header.architecture}.vocab_size"
        if vocabulary not in fields and "token_embd.weight" in self.tensors:
            fields[vocabulary] = _field(self.shape("token_embd.weight")[0])
        return SimpleNamespace(fields=fields, tensors=list(self.header.tensors))


def _together(calls: Sequence[Callable[[], None]]) -> None:
    """Makes the calls at the same time, the first in this thread. Reading and dequantising leave the interpreter."""
    others = [_workers().submit(call) for call in calls[1:]]
    try:
        calls[0]()
    finally:
        wait(others)
    for other in others:
        other.result()


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), "dequantise")


def _field(value: Any) -> SimpleNamespace:
    """A metadata value as a gguf.ReaderField: parts, the indices of those that hold the value, and types."""
    kinds = gguf.GGUFValueType
    items = list(value) if isinstance(value, tuple) else [value]
    parts: list[Any] = []
    kind = kinds.STRING
    for item in items:
        if isinstance(item, str):
            parts.append(np.frombuffer(item.encode(), np.uint8))
        elif isinstance(item, bool):
            kind = kinds.BOOL
            parts.append(np.array([item]))
        elif isinstance(item, int):
            kind = kinds.INT64
            parts.append(np.array([item]))
        else:
            kind = kinds.FLOAT64
            parts.append(np.array([item]))
    types = [kinds.ARRAY, kind] if isinstance(value, tuple) else [kind]
    return SimpleNamespace(parts=parts, data=list(range(len(parts))), types=types)
