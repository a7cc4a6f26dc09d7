"""How many tokens one request may use, where the configuration leaves it to the machine."""

from agentd.budget.model_shapes import F16, ModelShapes
from agentd.limits import PROMPT_PIECE

LEAST, MOST = 2048, 32768  # tokens, unless the model was trained for less
_STEP = 256  # llama.cpp's step for the size of a cache
_SHARE = 2  # serving's caches may take one part in this many of what is free; the rest is for learning
_SCORE_BYTES = 4  # attention scores are float32


def fitted(shapes: ModelShapes, trained: int | None, slots: int, free: int, value_bytes: int = F16) -> int:
    """Tokens per request: what the model was trained for, as far as the caches of all slots, full, and the attention
    scores of one piece of a prompt take no more than a share of `free`, which is bytes beyond the weights and the
    reserve. `value_bytes`: of a value in a cache."""
    most = min(trained or MOST, MOST)
    per_token = slots * shapes.kv_bytes_per_token * value_bytes // F16 + PROMPT_PIECE * shapes.n_head * _SCORE_BYTES
    affordable = free // _SHARE // per_token // _STEP * _STEP
    return min(most, max(affordable, LEAST))
