"""`python -m agentd.engine.llamacpp.quantiser` in a process of its own: llama.cpp's quantiser, and what a model does.

    quantise SOURCE TARGET TYPE    a line {"done": tensors, "of": tensors} for each tensor; at the end {"ok": true}
    measure MODEL THREADS          {"prefill", "decode"} in tokens a second, {"loss"} in nats a token of the texts that
                                   come as JSON on standard input
    types                          the names of the types

What goes wrong is {"error": why}. llama.cpp ends a process where a file is not what it should be: so it is not ours.
"""

import contextlib
import json
import re
import sys
import time
from pathlib import Path

import llama_cpp as lc
import numpy as np

from agentd.engine.llamacpp.context import Context
from agentd.engine.llamacpp.library import load_model
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.probabilities import log_probabilities
from agentd.errors import AgentdError

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
TYPES: dict[str, int] = {name[len(_PREFIX) :]: getattr(lc, name) for name in dir(lc) if name.startswith(_PREFIX)}
_PROMPT, _ANSWER, _ROUNDS = 256, 24, 3  # tokens read and written, and how often: the fastest counts
_TENSOR = re.compile(rb"\[\s*(\d+)\s*/\s*(\d+)\s*\]")


class Failed(Exception):
    """llama.cpp could not do it."""


def quantise(source: Path, target: Path, name: str) -> None:
    """Raises Failed."""
    said: list[str] = []

    @lc.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes
    def log(level: int, text: bytes, _: object) -> None:
        if level in (3, 4):
            said.append(text.decode("utf-8", "replace").strip())
        if match := _TENSOR.search(text):
            _say({"done": int(match[1]), "of": int(match[2])})

    lc.llama_log_set(log, None)
    lc.llama_backend_init()
    parameters = lc.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = TYPES[name], True
    if lc.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise Failed("; ".join(said[-2:]) or "llama.cpp gave no reason")


def measure(path: Path, threads: int, texts: list[str]) -> dict[str, float]:
    """Raises ModelUnusable and what else keeps it from running."""
    model = load_model(path)
    vocabulary = Vocabulary(model)
    context = Context(model, n_ctx=2 * _PROMPT, n_seq=1, width=_PROMPT, threads=threads, streams=True)
    tokens = np.random.default_rng(0).integers(0, vocabulary.size, _PROMPT + _ANSWER).tolist()
    prefill = decode = float("inf")
    for _ in range(_ROUNDS):
        context.forget()
        began = time.perf_counter()
        context.decode(tokens[:_PROMPT], range(_PROMPT), [(0,)] * _PROMPT, [])
        prefill = min(prefill, time.perf_counter() - began)
        began = time.perf_counter()
        for at in range(_PROMPT, _PROMPT + _ANSWER):
            context.decode([tokens[at]], [at], [(0,)], [0])
        decode = min(decode, time.perf_counter() - began)
    losses: list[float] = []
    for text in texts:
        sequence = vocabulary.tokenize(text, begin=True)[:_PROMPT]
        context.forget()
        rows = range(len(sequence) - 1)
        context.decode(sequence[:-1], rows, [(0,)] * len(rows), rows)
        losses += [-float(log_probabilities(context.logits(row))[sequence[row + 1]]) for row in rows]
    context.close()
    lc.llama_model_free(model)
    rates = {"prefill": _PROMPT / prefill, "decode": _ANSWER / decode}
    return {**rates, "loss": float(np.mean(losses)) if losses else float("nan")}


def _say(message: object) -> None:
    print(json.dumps(message), flush=True)


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["quantise", source, target, name]:
                quantise(Path(source), Path(target), name)
                _say({"ok": True})
            case ["measure", model, threads]:
                _say(measure(Path(model), int(threads), json.load(sys.stdin)))
            case ["types"]:
                _say(sorted(TYPES))
            case _:
                raise Failed(f"unknown arguments {arguments}")
    except (Failed, AgentdError, OSError) as error:
        _say({"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))
