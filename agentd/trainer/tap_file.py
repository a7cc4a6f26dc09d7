"""The tap: hidden states that the engine wrote to a file, row by row, read where they are needed.

A row is the input of the first trained block for one token: `n_embd` float32. The rows of the prefix that all
sequences share are there once, and so are those that the answers to one text share.
"""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentd.errors import TrainerFailed
from agentd.trainer.batches import Batch, Example, Layout, Span
from agentd.trainer.spec import InvalidSpec


class TapFile:
    """A plane of rows for each tapped block. Raises InvalidSpec if the file is missing or holds less than is needed.

    The file is read and written row by row, not mapped: pages of a mapping would count as this process's memory.
    """

    def __init__(self, path: Path, n_embd: int, layout: Layout, planes: int = 1, *, writable: bool = False) -> None:
        self.layout = layout
        row = 4 * n_embd * planes
        try:
            size = path.stat().st_size
            if size == 0 or size % row:
                raise InvalidSpec([f"tap: {path} has {size} bytes, which is not a number of rows of {row} bytes"])
            self._file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise InvalidSpec([f"tap: {path}: {error.strerror or error}"]) from None
        weakref.finalize(self, os.close, self._file)
        self._path, self._n_embd, self._rows = path, n_embd, size // row

    def check(self, examples: Sequence[Example]) -> None:
        """Raises InvalidSpec if an example lies outside the file."""
        prefix = self.layout.prefix
        spans = [("the prefix", prefix)]
        for example in examples:
            end = self.layout.starts[example.number] + example.encoded.n_distinct - prefix
            spans.append((f"example {example.number}", end))
        for what, end in spans:
            if end > self._rows:
                raise InvalidSpec([f"tap: it is cut short: {what} needs rows up to {end}, and there are {self._rows}"])

    def inputs(self, batch: Batch, plane: int = 0) -> torch.Tensor:
        """(rows, tokens, n_embd) of a forward pass, zero where a sequence has ended."""
        out = torch.zeros(*batch.shape, self._n_embd)
        for piece in batch.pieces():
            self._read(piece, plane, out[piece.sequence, piece.position : piece.position + piece.n])
        return out

    def replace(self, batch: Batch, states: torch.Tensor) -> None:
        """Writes (rows, tokens, n_embd) where `inputs` read it, all but the prefix, which other batches still need."""
        for piece in batch.pieces():
            if piece.example is not None:
                self._write(piece, states[piece.sequence, piece.position : piece.position + piece.n].numpy())

    def replace_prefix(self, states: torch.Tensor) -> None:
        """Writes (prefix, n_embd)."""
        self._write(Span(None, 0, self.layout.prefix, 0, 0), states.numpy())

    def _place(self, piece: Span) -> int:
        return piece.offset if piece.example is None else self.layout.starts[piece.example.number] + piece.offset

    def _read(self, piece: Span, plane: int, out: torch.Tensor) -> None:
        """Into `out` (rows, n_embd), which is contiguous. Raises TrainerFailed if the file has become shorter."""
        at = 4 * self._n_embd * (plane * self._rows + self._place(piece))
        try:
            read = os.preadv(self._file, [out.numpy().data], at) if piece.n else 0
        except OSError as error:
            raise TrainerFailed(f"{self._path}: {error.strerror or error}") from None
        if read != out.nbytes:
            raise TrainerFailed(f"{self._path} ends before row {self._place(piece) + piece.n}")

    def _write(self, piece: Span, states: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """In plane 0. Raises TrainerFailed, for instance on a full disk."""
        data = np.ascontiguousarray(states, np.float32)
        try:
            written = os.pwritev(self._file, [data.data], 4 * self._n_embd * self._place(piece)) if piece.n else 0
        except OSError as error:
            raise TrainerFailed(f"{self._path}: {error.strerror or error}") from None
        if written != data.nbytes:
            raise TrainerFailed(f"{self._path}: no more than {written} of {data.nbytes} bytes could be written")
