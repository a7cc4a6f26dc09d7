"""What the frozen trunk makes of every example, computed once and kept in a file without a name.

A token's state depends on the tokens before it in its sequence and on nothing else, so an example's states are the same
in whichever company it is run: they are kept by example, and a pack's are put together from them. The file's pages
belong to the kernel's cache, not to a process; it is gone when the session is.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agentd.engine.transformers.forward import Pack
from agentd.learn.encoded import Encoded


class TrunkStates:
    """Keeps states in `folder`; a pack is the key. Examples are known by being the same object."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".trunk-")  # noqa: SIM115  # as long as this is
        self._places: dict[int, tuple[Encoded, int]] = {}  # the example too, so that its id stays its own
        self._end = 0

    def knows(self, pack: Pack) -> bool:
        return all(id(example) in self._places for example in pack.examples)

    def put(self, pack: Pack, state: Tensor) -> None:
        """`state` (1, tokens, D) of the pack's tokens, padding behind them."""
        for number, example in enumerate(pack.examples):
            if id(example) in self._places:
                continue
            raw = state[0, _rows(pack, number)].cpu().contiguous().view(torch.uint8).numpy()
            self._file.seek(self._end)
            self._file.write(raw.tobytes())
            self._places[id(example)] = example, self._end
            self._end += raw.nbytes

    def get(self, pack: Pack, like: Tensor) -> Tensor:
        states = torch.zeros_like(like)
        width = like.shape[-1]
        for number, example in enumerate(pack.examples):
            rows = _rows(pack, number)
            self._file.seek(self._places[id(example)][1])
            raw = np.frombuffer(bytearray(self._file.read(len(rows) * width * like.element_size())), np.uint8)
            states[0, rows] = torch.from_numpy(raw).view(like.dtype).view(-1, width).to(like.device)
        return states

    def close(self) -> None:
        self._file.close()


def _rows(pack: Pack, number: int) -> list[int]:
    """The rows of an example's tokens, each once, in an order that is the same in every pack."""
    return list(dict.fromkeys(row for sequence in pack.rows[number] for row in sequence))
