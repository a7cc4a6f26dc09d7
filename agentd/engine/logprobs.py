"""Log-probabilities as answers show them: a token's, and those of the likeliest beside it."""

from typing import Any

from agentd.engine.probabilities import Floats
from agentd.engine.prompts import Prompts


def logprob(vocabulary: Prompts, values: Floats, token: int, top: int) -> dict[str, Any]:
    """A token's entry with those of the `top` likeliest; `values` are log-probabilities (n_vocab,)."""
    best: list[int] = values.argpartition(-top)[-top:].tolist() if top else []
    ranked = sorted(best, key=lambda i: -values[i])
    return {
        **_entry(vocabulary, token, values),
        "top_logprobs": [_entry(vocabulary, other, values) for other in ranked],
    }


def _entry(vocabulary: Prompts, token: int, values: Floats) -> dict[str, Any]:
    data = vocabulary.piece(token, special=True)
    return {"token": data.decode("utf-8", "replace"), "logprob": float(values[token]), "bytes": list(data)}
