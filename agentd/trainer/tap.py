"""The tap: hidden states that the engine wrote to a file, row by row, read where they are needed.

A row is the input of the first trained block for one token: `n_embd` float32. The rows of the prefix that all
sequences share are there once.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentd.errors import TrainerFailed
from agentd.trainer.spec import Example, InvalidSpec, Rows

_PASS = 64  # tokens that take as long as beginning a forward pass does


@dataclass(frozen=True)
class Batch:
    """Some examples' sequences, padded on the right to the longest.

    examples  in the order of their sequences
    first     per example, the row in `inputs` of its first sequence
    lengths   of the sequences, without the prefix
    """

    examples: list[Example]
    first: list[int]
    lengths: list[int]

    @property
    def width(self) -> int:
        return max(self.lengths)


class Tap:
    """A plane of rows for each tapped block. Raises InvalidSpec if the file is missing or holds less than is needed.

    The file is read and written row by row, not mapped: pages of a mapping would count as this process's memory.
    """

    def __init__(self, path: Path, n_embd: int, prefix: Rows, planes: int = 1, *, writable: bool = False) -> None:
        self.prefix_rows = prefix
        row = 4 * n_embd * planes
        try:
            size = path.stat().st_size
            if size == 0 or size % row:
                raise InvalidSpec([f"tap.path: {path} has {size} bytes, which is not a number of rows of {row} bytes"])
            self._file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise InvalidSpec([f"tap.path: {path}: {error.strerror or error}"]) from None
        weakref.finalize(self, os.close, self._file)
        self._path, self._n_embd, self._rows = path, n_embd, size // row

    def check(self, examples: Sequence[Example]) -> None:
        """Raises InvalidSpec if a sequence lies outside the file."""
        spans = [("prefix", self.prefix_rows)]
        spans += [(f"example {example.id!r}", rows) for example in examples for rows in example.sequences]
        for what, rows in spans:
            if rows.offset + rows.n > self._rows:
                raise InvalidSpec(
                    [
                        f"tap.path: the tap is cut short: {what} needs rows up to {rows.offset + rows.n}, "
                        f"and there are {self._rows}"
                    ]
                )

    def prefix(self, plane: int = 0) -> torch.Tensor:
        """(1, prefix, n_embd)."""
        out = torch.empty(self.prefix_rows.n, self._n_embd)
        self._read(self.prefix_rows, plane, out)
        return out[None]

    def inputs(self, batch: Batch, plane: int = 0) -> torch.Tensor:
        """(sequences, width, n_embd), without the prefix, zero where a sequence has ended."""
        sequences = [rows for example in batch.examples for rows in example.sequences]
        out = torch.zeros(len(sequences), batch.width, self._n_embd)
        for i, rows in enumerate(sequences):
            self._read(rows, plane, out[i, : rows.n])
        return out

    def replace(self, batch: Batch, states: torch.Tensor) -> None:
        """Writes (sequences, width, n_embd) where `inputs` read it."""
        sequences = [rows for example in batch.examples for rows in example.sequences]
        for rows, state in zip(sequences, states.numpy(), strict=True):
            self._write(rows, state[: rows.n])

    def replace_prefix(self, states: torch.Tensor) -> None:
        """Writes (1, prefix, n_embd)."""
        self._write(self.prefix_rows, states[0].numpy())

    def _read(self, rows: Rows, plane: int, out: torch.Tensor) -> None:
        """Into `out` (rows, n_embd), which is contiguous. Raises TrainerFailed if the file has become shorter."""
        at = 4 * self._n_embd * (plane * self._rows + rows.offset)
        try:
            read = os.preadv(self._file, [out.numpy().data], at) if rows.n else 0
        except OSError as error:
            raise TrainerFailed(f"{self._path}: {error.strerror or error}") from None
        if read != out.nbytes:
            raise TrainerFailed(f"{self._path} ends before row {rows.offset + rows.n}")

    def _write(self, rows: Rows, states: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """In plane 0. Raises TrainerFailed, for instance on a full disk."""
        data = np.ascontiguousarray(states, np.float32)
        try:
            written = os.pwritev(self._file, [data.data], 4 * self._n_embd * rows.offset) if rows.n else 0
        except OSError as error:
            raise TrainerFailed(f"{self._path}: {error.strerror or error}") from None
        if written != data.nbytes:
            raise TrainerFailed(f"{self._path}: no more than {written} of {data.nbytes} bytes could be written")


def shares_well(examples: Sequence[Example], prefix: int, tokens: int) -> bool:
    """Whether a prefix had better be computed once for all sequences of a micro-batch of `tokens` tokens.

    That is a forward pass of its own: for a few tokens it takes longer than they take in every sequence.
    """
    lengths = [rows.n for example in examples for rows in example.sequences]
    sequences = tokens / (prefix + sum(lengths) / len(lengths))
    return (sequences - 1) * prefix > _PASS


def batches(examples: Sequence[Example], prefix: int, tokens: int, shared: bool) -> list[Batch]:
    """Micro-batches of similar length, each of at most `tokens` tokens with padding and prefix (or one example).

    shared  the prefix is computed once for all sequences, not once for each
    """
    out: list[Batch] = []
    part: list[Example] = []
    for example in sorted(examples, key=lambda example: max(rows.n for rows in example.sequences)):
        if part and _tokens([*part, example], prefix, shared) > tokens:
            out.append(_batch(part))
            part = []
        part.append(example)
    return [*out, _batch(part)] if part else out


def _tokens(part: list[Example], prefix: int, shared: bool) -> int:
    sequences = [rows.n for example in part for rows in example.sequences]
    return len(sequences) * max(sequences) + prefix * (1 if shared else len(sequences))


def _batch(part: list[Example]) -> Batch:
    first: list[int] = []
    lengths: list[int] = []
    for example in part:
        first.append(len(lengths))
        lengths += [rows.n for rows in example.sequences]
    return Batch(part, first, lengths)
