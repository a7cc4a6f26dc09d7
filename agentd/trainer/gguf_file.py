"""A GGUF file as torch tensors: only what is asked for is read, and dequantised in pieces."""

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from agentd.errors import ModelUnusable
from agentd.gguf_header import Tensor, read_header

_PIECE = 1 << 21  # weights dequantised at once: 8 MB in float32, half of it again on the way


class GGUFFile:
    """Raises ModelUnusable for a file that is missing, damaged or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in self.header.tensors}
        self._data = np.memmap(path, mode="r", dtype=np.uint8)
        if len(self._data) < self.header.total_size:
            raise ModelUnusable(path, f"it is cut short: {len(self._data)} of {self.header.total_size} bytes")

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order, the contiguous dimension last."""
        return tuple(reversed(self.tensors[name].shape))

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights of `name` as (rows, columns), or whatever dimensions it has."""
        tensor = self.tensors[name]
        shape = self.shape(name)
        kind = gguf.GGMLQuantizationType[tensor.type]
        raw = self._data[tensor.offset : tensor.offset + tensor.size]
        out = torch.empty(shape, dtype=dtype)
        rows = out.view(-1, shape[-1])
        row_bytes = tensor.size // len(rows)
        step = max(1, _PIECE // shape[-1])
        for begin in range(0, len(rows), step):
            piece = raw[begin * row_bytes : (begin + step) * row_bytes].reshape(-1, row_bytes)
            rows[begin : begin + step] = torch.from_numpy(_dequantise(piece, kind))
        return out

    def forget(self) -> None:
        """Gives back the pages that reading brought in; the file stays open."""
        mapping: Any = self._data._mmap  # type: ignore[attr-defined]
        mapping.madvise(mmap.MADV_DONTNEED)

    def reader(self) -> SimpleNamespace:
        """What transformers' GGUF loader wants to see of a gguf.GGUFReader, without the vocabulary.

        The real reader makes an array of every token: 1.6 s and 166 MB for 49,152 of them.
        """
        fields = {key: _field(value) for key, value in self.header.metadata.items()}
        vocabulary = f"{self.header.architecture}.vocab_size"
        if vocabulary not in fields and "token_embd.weight" in self.tensors:
            fields[vocabulary] = _field(self.shape("token_embd.weight")[0])
        return SimpleNamespace(fields=fields, tensors=list(self.header.tensors))


def _dequantise(piece: npt.NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.float32]:
    if kind == gguf.GGMLQuantizationType.F32:
        return piece.view(np.float32).copy()
    if kind == gguf.GGMLQuantizationType.F16:
        return piece.view(np.float16).astype(np.float32)
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(piece, kind)
    return values


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
