"""Matrices that stay in the model file: dequantised where they are multiplied, a few rows at a time.

A block of a model of 4 billion parameters is 400 MB in float32. Multiplied by a part at a time it takes what a part
takes, whatever the model's size, and the part is still in the processor's cache when it is multiplied.
"""

from collections.abc import Iterator

import torch
from torch import nn

from agentd.limits import PART_WEIGHTS
from agentd.nn.gguf_file import GGUFFile


class Matrix:
    """The matrix (rows, columns) that the file calls `name`, in `dtype`.

    space  memory that its parts are made in, which others may share: only one part is there at a time
    """

    def __init__(
        self, file: GGUFFile, name: str, dtype: torch.dtype = torch.float32, space: torch.Tensor | None = None
    ) -> None:
        self._file, self._name, self.dtype = file, name, dtype
        self.shape = file.shape(name)
        n, width = self.shape
        parts = -(-n // max(1, PART_WEIGHTS // width))
        self.step = -(-n // parts)  # rows of a part: all have as many, or nearly so
        self._space = torch.empty(self.step * width, dtype=dtype) if space is None else space

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1]

    def part(self, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end), at most `step` of them, in memory that the next call uses again."""
        out = self._space[: (end - begin) * self.width].view(end - begin, self.width)
        return self._file.load(self._name, self.dtype, out=out, rows=slice(begin, end))

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(begin, end, rows [begin, end)), from the first row to the last."""
        for begin in range(0, len(self), self.step):
            end = min(begin + self.step, len(self))
            yield begin, end, self.part(begin, end)

    def pick(self, rows: torch.Tensor) -> torch.Tensor:
        """(len(rows), width) in float32."""
        return self._file.rows(self._name, rows)


def part_space(dtype: torch.dtype, widest: int) -> torch.Tensor:
    """Memory that a part of any matrix of up to `widest` columns fits into."""
    return torch.empty(max(PART_WEIGHTS, widest), dtype=dtype)


def weight_of(layer: nn.Module) -> torch.Tensor | Matrix:
    """What the layer multiplies by: its weight, or the matrix in the file that stands for it (`keep_in_file`)."""
    matrix: torch.Tensor | Matrix = vars(layer).get("matrix", layer.weight)
    return matrix


def keep_in_file(layer: nn.Module, matrix: Matrix) -> None:
    """Lets the layer multiply by a matrix in the file; its own weight stays without memory."""
    vars(layer)["matrix"] = matrix
