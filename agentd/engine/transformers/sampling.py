"""From logits to a token, with the settings and in the order of llama.cpp's samplers; answers among given choices.

Grammars are llama.cpp's own: what asks for one is refused.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Generate, Sampling
from agentd.engine.transformers.vocabulary import Vocabulary
from agentd.errors import AgentdError, NotSupported

_FORBIDDEN = np.float32(-np.inf)


class Choices:
    """What may still be said so that the answer is one of the choices, in bytes: tokens may end inside a character."""

    def __init__(self, vocabulary: Vocabulary, choices: Sequence[str], *, space: bool) -> None:
        """With `space`, one may come before the answer, as after a raw prompt."""
        self._vocabulary = vocabulary
        self._left = [choice.encode("utf-8", "replace") for choice in choices]
        if space:
            self._left += [b" " + choice for choice in self._left]

    def allowed(self) -> list[int]:
        """The tokens that may come next; the end of turn once a choice is complete."""
        tokens = {
            token
            for beginning in {left[:n] for left in self._left for n in range(1, len(left) + 1)}
            for token in self._vocabulary.tokens_of(beginning)
        }
        if b"" in self._left:
            tokens.add(self._vocabulary.end)
        return sorted(tokens)

    def accept(self, token: int) -> None:
        data = self._vocabulary.piece(token)
        if data:
            self._left = [left[len(data) :] for left in self._left if left.startswith(data)]


class Sampler:
    """Samples the tokens of one request. Raises NotSupported for grammars and JSON schemas."""

    def __init__(self, vocabulary: Vocabulary, request: Generate) -> None:
        self._sampling = sampling = request.sampling
        for given, param in ((sampling.grammar, "grammar"), (sampling.json_schema, "response_format")):
            if given is not None:
                what = "grammars" if param == "grammar" and given != "json" else "JSON mode and JSON schemas"
                raise NotSupported(
                    f"the engine transformers has no {what} (a grammar is llama.cpp's own); use choices, or "
                    f"engine: llamacpp",
                    param=param,
                )
        self._choices: Choices | None = None
        if request.choices:
            raw = str(request.input.get("prompt", " "))
            self._choices = Choices(vocabulary, request.choices, space=not raw[-1:].isspace())
        self._said: Counter[int] = Counter()
        self._random = np.random.default_rng(sampling.seed)

    def sample(self, row: int, logits: Floats) -> int:
        """The next token for logits (n_vocab,). Raises AgentdError where they are not numbers."""
        values = np.array(logits, dtype=np.float32)
        for token, bias in self._sampling.logit_bias:
            if 0 <= token < len(values):
                values[token] += np.float32(bias)
        self._penalise(values)
        if self._choices is not None:
            allowed = self._choices.allowed()
            only = np.full_like(values, _FORBIDDEN)
            only[allowed] = values[allowed]
            values = only
        if not np.isfinite(values.max()):
            raise AgentdError("no token can follow here: the model's numbers are not finite")
        token = int(values.argmax()) if self._sampling.temperature == 0 else self._draw(values)
        self._said[token] += 1
        if self._choices is not None:
            self._choices.accept(token)
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
