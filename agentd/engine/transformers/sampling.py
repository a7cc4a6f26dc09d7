"""From logits to a token, with the settings and in the order of llama.cpp's samplers."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from agentd.engine.constraints import Constraint
from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Sampling
from agentd.errors import AgentdError

_FORBIDDEN = np.float32(-np.inf)


class TokenSampler:
    """Samples the tokens of one request."""

    def __init__(self, sampling: Sampling, constraint: Constraint | None) -> None:
        self._sampling, self._constraint = sampling, constraint
        self._said: Counter[int] = Counter()
        self._random = np.random.default_rng(sampling.seed)

    def sample(self, row: int, logits: Callable[[], Floats]) -> int:
        """The next token for logits (n_vocab,). Raises AgentdError where they are not numbers."""
        values = np.array(logits(), dtype=np.float32)
        for token, bias in self._sampling.logit_bias:
            if 0 <= token < len(values):
                values[token] += np.float32(bias)
        self._penalise(values)
        if self._constraint is not None and (allowed := self._constraint.allowed()) is not None:
            only = np.full_like(values, _FORBIDDEN)
            only[allowed] = values[allowed]
            values = only
        if not np.isfinite(values.max()):
            raise AgentdError("no token can follow here: the model's numbers are not finite")
        token = int(values.argmax()) if self._sampling.greedy else self._draw(values)
        if self._constraint is not None:
            token = self._constraint.take(token)
        self._said[token] += 1
        return token

    def close(self) -> None:
        """There is nothing to free."""

    def _penalise(self, values: Floats) -> None:
        """Keskar et al. 2019 (repetition) and OpenAI's frequency and presence penalties, on what was said so far."""
        sampling = self._sampling
        if not self._said or penalties(sampling) == (1.0, 0.0, 0.0):
            return
        tokens = np.fromiter(self._said, np.int64)
        counts = np.fromiter(self._said.values(), np.float32)
        said = values[tokens]
        said = np.where(said <= 0, said * sampling.repeat_penalty, said / sampling.repeat_penalty)
        values[tokens] = said - counts * sampling.frequency_penalty - sampling.presence_penalty

    def _draw(self, values: Floats) -> int:
        sampling = self._sampling
        if 0 < sampling.top_k < len(values):
            order = np.argpartition(-values, sampling.top_k - 1)[: sampling.top_k]
        else:
            order = np.flatnonzero(values > _FORBIDDEN)
        order = order[np.argsort(-values[order], kind="stable")]
        logits = values[order].astype(np.float64)
        p = _softmax(logits)
        if sampling.top_p < 1:
            n = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
            order, logits, p = order[:n], logits[:n], p[:n]
        if sampling.min_p > 0:
            n = max(1, int((p >= sampling.min_p * p[0]).sum()))
            order, logits = order[:n], logits[:n]
        cumulated = np.cumsum(_softmax(logits / sampling.temperature))
        place = int(np.searchsorted(cumulated, self._random.random() * cumulated[-1], side="right"))
        return int(order[min(place, len(order) - 1)])


def penalties(sampling: Sampling) -> tuple[float, float, float]:
    return sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty


def _softmax(logits: "np.typing.NDArray[np.float64]") -> "np.typing.NDArray[np.float64]":
    """Of logits in falling order."""
    p: np.typing.NDArray[np.float64] = np.exp(logits - logits[0])
    p /= p.sum()
    return p
