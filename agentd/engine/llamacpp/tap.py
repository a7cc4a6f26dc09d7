"""Hidden states out of a normal decode, through llama.cpp's evaluation callback."""

from typing import Any

import llama_cpp as lc
import numpy as np

from agentd.engine.llamacpp.adapters import Floats
from agentd.engine.llamacpp.library import ggml
from agentd.errors import EngineUnavailable


class Tap:
    """Collects the input of one block. `callback` is for the context's parameters."""

    def __init__(self) -> None:
        self._names: frozenset[bytes] = frozenset()
        self._parts: list[Floats] = []
        self._pending: list[Floats] = []  # of the decode that is running
        library = ggml()

        def on_tensor(tensor: int, ask: bool, user_data: Any) -> bool:
            if not self._names or library.ggml_get_name(tensor) not in self._names:
                return not ask
            if not ask:
                part = np.empty(library.ggml_nelements(tensor), np.float32)
                library.ggml_backend_tensor_get(tensor, part.ctypes.data, 0, part.nbytes)
                self._pending.append(part)
            return True

        self.callback = lc.ggml_backend_sched_eval_callback(on_tensor)

    def watch(self, block: int | None) -> None:
        """Block i's input is the output of block i - 1; block 0's is the embedding, named by architecture."""
        self._parts, self._pending = [], []
        if block is None:
            self._names = frozenset()
        else:
            self._names = frozenset({f"l_out-{block - 1}".encode()} if block else {b"inp_embd", b"embd"})

    def rows(self, n: int, n_embd: int, skip_last: int = 0) -> Floats:
        """The last `n` rows (n, n_embd) collected, before the `skip_last` newest ones."""
        if not self._parts:
            raise EngineUnavailable("this architecture's graph does not name its block outputs; BP cannot be used")
        rows = np.concatenate([part.reshape(-1, n_embd) for part in self._parts])
        stop = len(rows) - skip_last
        if stop < n:
            raise EngineUnavailable(f"the tap collected {stop} rows where {n} were computed")
        return rows[stop - n : stop]

    def settle(self, complete: bool) -> None:
        """Keeps what a decode produced, or drops it where the decode was interrupted and will be repeated."""
        if complete:
            self._parts += self._pending
        self._pending = []

    def clear(self) -> None:
        self._parts = []
