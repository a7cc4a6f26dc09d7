"""From logits to a token: llama.cpp's own samplers, constrained by a grammar where one is asked for."""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp as lc
import numpy as np
from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Generate, Sampling
from agentd.errors import AgentdError, InvalidRequest

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
JSON_GRAMMAR: str = JSON_GBNF


def choices_grammar(choices: Sequence[str], *, space: bool) -> str:
    """A grammar that allows exactly these answers; with `space`, one may come before, as after a raw prompt."""
    before = '" "? ' if space else ""
    return f"root ::= {before}(" + " | ".join(f'"{"".join(map(_gbnf, choice))}"' for choice in choices) + ")"


def _gbnf(character: str) -> str:
    """A character of a GBNF literal, which knows fewer escapes than JSON."""
    plain = character.isprintable() and character not in '"\\'
    return character if plain else f"\\x{ord(character):02X}" if ord(character) < 256 else f"\\U{ord(character):08X}"


class Sampler:
    """The sampler chain of one request on a context. `close` frees it."""

    def __init__(self, context: Any, vocab: Any, n_vocab: int, request: Generate) -> None:
        self._context, self._n_vocab = context, n_vocab
        sampling = request.sampling
        grammar = JSON_GRAMMAR if sampling.grammar == "json" else sampling.grammar
        if request.choices:
            raw = str(request.input.get("prompt", " "))
            grammar = choices_grammar(request.choices, space=not raw[-1:].isspace())
        if sampling.json_schema is not None:
            try:
                grammar = json_schema_to_gbnf(sampling.json_schema)
            except Exception as error:  # the converter raises whatever its parser meets
                raise InvalidRequest(f"cannot use this JSON schema: {error}", param="response_format") from None
        self._grammar = None
        if grammar is not None:
            with _silent():
                self._grammar = lc.llama_sampler_init_grammar(vocab, grammar.encode("utf-8", "replace"), b"root")
            if not (self._grammar and grammar.strip()):  # an empty one would allow everything
                raise InvalidRequest("the grammar is not valid GBNF with a rule `root`", param="grammar")
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
        if sampling.temperature == 0:
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

    def sample(self, row: int, logits: Floats) -> int:
        """The next token after `row` of the last batch, whose logits (n_vocab,) are given too."""
        if self._grammar is None:
            return int(lc.llama_sampler_sample(self._chain, self._context, row))
        # The grammar is slow over a whole vocabulary; mostly the free choice is allowed already.
        token = self._choose(logits, constrained=False)
        if not self._allowed(token):
            token = self._choose(logits, constrained=True)
            if not self._allowed(token):  # llama.cpp would end the process
                raise AgentdError("no token can follow here: the model's numbers are not finite")
        for sampler in (self._chain, self._grammar):
            lc.llama_sampler_accept(sampler, token)
        return token

    def _choose(self, logits: Floats, *, constrained: bool) -> int:
        candidates = np.zeros(self._n_vocab, dtype=_TOKEN_DATA)
        candidates["id"], candidates["logit"] = np.arange(self._n_vocab), logits
        view = _view(candidates)
        if constrained:
            lc.llama_sampler_apply(self._grammar, ctypes.byref(view))
        lc.llama_sampler_apply(self._chain, ctypes.byref(view))
        return int(view.data[view.selected].id)

    def _allowed(self, token: int) -> bool:
        candidates = np.array([(token, 1.0, 0.0)], dtype=_TOKEN_DATA)
        view = _view(candidates)
        lc.llama_sampler_apply(self._grammar, ctypes.byref(view))
        return bool(np.isfinite(candidates["logit"][0]))

    def close(self) -> None:
        lc.llama_sampler_free(self._chain)
        if self._grammar:
            lc.llama_sampler_free(self._grammar)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """llama.cpp's parser prints a grammar it does not understand to stderr, past its own logging; a client's text has
    no place in a log. The engine's one thread may redirect it for that moment."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _view(candidates: "np.ndarray[Any, np.dtype[Any]]") -> Any:
    data = candidates.ctypes.data_as(lc.llama_token_data_p)
    return lc.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
