"""From logits to a token: llama.cpp's own samplers, over the tokens that a constraint allows where there is one."""

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp as lc
import numpy as np

from agentd.engine.constraints import Constraint
from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Sampling
from agentd.errors import AgentdError

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class TokenSampler:
    """The sampler chain of one request on a context. `close` frees it."""

    def __init__(self, context: Any, n_vocab: int, sampling: Sampling, constraint: Constraint | None) -> None:
        self._context, self._n_vocab, self._constraint = context, n_vocab, constraint
        self._chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        for sampler in self._samplers(sampling):
            lc.llama_sampler_chain_add(self._chain, sampler)

    def _samplers(self, sampling: Sampling) -> list[Any]:
        chain = []
        if sampling.logit_bias:
            biases = (lc.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias)
            chain.append(lc.llama_sampler_init_logit_bias(self._n_vocab, len(biases), biases))
        penalties = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        if penalties != (1.0, 0.0, 0.0):
            chain.append(lc.llama_sampler_init_penalties(self._n_vocab, 1 << 15, *penalties))
        if sampling.greedy:
            return [*chain, lc.llama_sampler_init_greedy()]
        # llama.cpp's default seed means "draw one", so a given seed must never become it.
        seed = lc.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed % lc.LLAMA_DEFAULT_SEED
        return [
            *chain,
            lc.llama_sampler_init_top_k(sampling.top_k),
            lc.llama_sampler_init_top_p(sampling.top_p, 1),
            lc.llama_sampler_init_min_p(sampling.min_p, 1),
            lc.llama_sampler_init_temp(sampling.temperature),
            lc.llama_sampler_init_dist(seed),
        ]

    def sample(self, row: int, logits: Callable[[], Floats]) -> int:
        """The next token after `row` of the last batch, whose logits (n_vocab,) `logits` has. Raises AgentdError."""
        allowed = None if self._constraint is None else self._constraint.allowed()
        if allowed is None:
            token = int(lc.llama_sampler_sample(self._chain, self._context, row))
            return token if self._constraint is None else self._constraint.take(token)
        candidates = np.zeros(len(allowed), dtype=_TOKEN_DATA)
        candidates["id"], candidates["logit"] = allowed, logits()[allowed]
        if not np.isfinite(candidates["logit"].max()):  # llama.cpp would end the process
            raise AgentdError("no token can follow here: the model's numbers are not finite")
        data = candidates.ctypes.data_as(lc.llama_token_data_p)
        view = lc.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
        lc.llama_sampler_apply(self._chain, ctypes.byref(view))
        token = int(view.data[view.selected].id)
        lc.llama_sampler_accept(self._chain, token)
        return token if self._constraint is None else self._constraint.take(token)

    def close(self) -> None:
        lc.llama_sampler_free(self._chain)
