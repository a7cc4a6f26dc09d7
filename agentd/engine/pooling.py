"""One vector of a text: the mean of its tokens' final hidden states, of length 1.

That is what sentence-transformers and llama.cpp's server take where a model says nothing of its own.
"""

import numpy as np
import numpy.typing as npt

from agentd.engine.probabilities import Floats
from agentd.errors import AgentdError

ROWS = 32  # tokens at a time: llama.cpp keeps n_vocab logits of each, 600 kB where a vocabulary has 150,000 tokens


class MeanPooling:
    """Takes states piece by piece. `vector` raises AgentdError where they make no direction."""

    def __init__(self) -> None:
        self._sum: npt.NDArray[np.float64] | None = None

    def add(self, states: Floats) -> None:
        """The states (tokens, n_embd) of the next tokens."""
        total = np.asarray(states.sum(axis=0, dtype=np.float64))
        self._sum = total if self._sum is None else self._sum + total

    def vector(self) -> list[float]:
        """(n_embd,) in float32. The sum has the direction of the mean."""
        length = 0.0 if self._sum is None else float(np.linalg.norm(self._sum))
        if self._sum is None or not (np.isfinite(length) and length > 0):
            raise AgentdError("there is no embedding: the model's numbers are not finite, or all zero")
        vector: list[float] = (self._sum / length).astype(np.float32).tolist()
        return vector
