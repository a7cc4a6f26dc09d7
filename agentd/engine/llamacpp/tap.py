"""Hidden states out of a normal decode, through llama.cpp's evaluation callback."""

from typing import Any

import llama_cpp as lc
import numpy as np

from agentd.engine.llamacpp.library import ggml
from agentd.engine.probabilities import Floats
from agentd.errors import EngineUnavailable

# Block 0's input is the embedding, which architectures name and scale in their own ways; the last of these counts.
_EMBEDDING = (
    b"embd",
    b"inp_embd",
    b"model.input_embed",
    b"model.embed_tokens",
    b"inp_scaled",
    b"inp_embd_scaled",
    b"inp_norm",
)


class TapRecorder:
    """Collects the inputs of a range of blocks. `callback` is for the context's parameters."""

    def __init__(self) -> None:
        self._blocks = range(0)
        self._block: dict[bytes, int] = {}
        self._parts: list[dict[int, Floats]] = []
        self._pending: dict[int, Floats] = {}  # of the decode that is running
        library = ggml()

        def on_tensor(tensor: int, ask: bool, user_data: Any) -> bool:
            block = self._block.get(library.ggml_get_name(tensor)) if self._block else None
            if block is None:
                return not ask
            if ask:
                return True
            part = np.empty(library.ggml_nelements(tensor), np.float32)
            library.ggml_backend_tensor_get(tensor, part.ctypes.data, 0, part.nbytes)
            self._pending[block] = part
            # What comes after the last tensor that is wanted need not be computed: False ends the graph here.
            return block == 0 or block != self._blocks[-1]

        self.callback = lc.ggml_backend_sched_eval_callback(on_tensor)

    def watch(self, blocks: range) -> None:
        """Collects the inputs of these blocks from now on, and nothing for an empty range.

        Block i's input is the output of block i - 1. A decode ends with the last block's input: its logits and the
        upper blocks' keys and values are not there afterwards.
        """
        self._parts, self._pending = [], {}
        self._blocks = blocks
        self._block = {f"l_out-{block - 1}".encode(): block for block in blocks if block}
        if 0 in blocks:
            self._block |= dict.fromkeys(_EMBEDDING, 0)

    def rows(self, block: int, n: int, n_embd: int, skip_last: int = 0) -> Floats:
        """The last `n` rows (n, n_embd) collected of a block, before the `skip_last` newest ones."""
        if not self._parts or any(block not in part for part in self._parts):
            raise EngineUnavailable("this architecture's graph does not name its block outputs; BP cannot be used")
        rows = np.concatenate([part[block].reshape(-1, n_embd) for part in self._parts])
        stop = len(rows) - skip_last
        if stop < n:
            raise EngineUnavailable(f"the tap collected {stop} rows where {n} were computed")
        return rows[stop - n : stop]

    def settle(self, complete: bool) -> None:
        """Keeps what a decode produced, or drops it where the decode was interrupted and will be repeated."""
        if complete and self._block:
            self._parts.append(self._pending)
        self._pending = {}

    def clear(self) -> None:
        self._parts = []
