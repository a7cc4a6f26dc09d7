"""What a prefix that is kept saves: `python -m tools.bench serving --prefixes`, see serving.py.

In an engine, without HTTP: the time to the first token of a question behind a system prompt and tools when nothing of
it is there, when others had the slots meanwhile, after a restart, and right after a swap and a rollback.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.protocol import Generate, Sampling
from agentd.formats import adapter_gguf
from agentd.host.cpu import cores

_MEMORY = 1 << 30  # bytes, and as many on disk
_SLOTS, _OTHERS = 4, 800  # and characters of what others ask, who take them all
_QUESTIONS = 3  # of each kind, the median counts
_numbers = itertools.count()
_SETTLED = 60.0  # seconds for a file to be written


def measured(model: Path, length: int) -> dict[str, Any]:
    """Milliseconds, and as shares of the first, for a prefix of about `length` tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engine = _start(model, folder, length)
        prefix = _prefix(engine, length)
        tokens, cold = _ask(engine, prefix)
        others = [f"{i} {prefix[-_OTHERS:]}" for i in range(_SLOTS + 1)]

        def with_others() -> None:
            for text in others:
                _ask(engine, text)

        figures = {"cold": cold, "later": _median(engine, prefix, before=with_others)}
        deadline = time.monotonic() + _SETTLED
        while not list((folder / "prefixes").glob("[!.]*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        engine.close()
        engine = _start(model, folder, length)
        figures["restarted"] = _ask(engine, prefix)[1]
        control = np.full((engine.info.n_layer - 1, engine.info.n_embd), 1e-3, np.float32)
        adapter_gguf.write_control(folder / "control.gguf", control)
        engine.stage("1", None, folder / "control.gguf")
        figures["before a swap"] = _median(engine, prefix)
        for weights, name in (("1", "after a swap"), ("0", "after a rollback")):
            for _ in engine.warming(weights, lambda: False):
                pass
            engine.swap(weights)
            figures[name] = _ask(engine, prefix)[1]
        engine.close()
    shares = {name: round(value / cold, 3) for name, value in figures.items()}
    return {"tokens": tokens, "ms": {name: round(value) for name, value in figures.items()}, "of cold": shares}


def main(model: Path, length: int) -> int:
    print(json.dumps(measured(model, length), indent=1))
    return 0


def _start(model: Path, folder: Path, length: int) -> LlamaCppEngine:
    prefixes = {"folder": str(folder / "prefixes"), "memory": _MEMORY, "disk": _MEMORY, "key": "bench"}
    engine = LlamaCppEngine(model, context=length + 512, slots=_SLOTS, threads=cores(), prefixes=prefixes)
    engine.prepare()
    return engine


def _prefix(engine: LlamaCppEngine, length: int) -> str:
    text, i = "You are the assistant of a house. You have these tools:", 0
    while len(engine.vocabulary.tokenize(text)) < length:
        text += f"\ntool {i}: switches lamp {i} of room {i % 7} on or off, and says whether that was possible."
        i += 1
    return text


def _median(engine: LlamaCppEngine, prefix: str, before: Callable[[], None] = lambda: None) -> float:
    times = []
    for _ in range(_QUESTIONS):
        before()
        times.append(_ask(engine, prefix)[1])
    return median(times)


def _ask(engine: LlamaCppEngine, prefix: str) -> tuple[int, float]:
    """Tokens of the prompt, and milliseconds to the first of an answer; what an idle engine does comes after."""
    number = next(_numbers)
    messages = [
        {"role": "system", "content": prefix},
        {"role": "user", "content": f"Question {number}: which lamp?"},
    ]
    began = time.perf_counter()
    engine.submit(Generate(f"{number}", {"messages": messages}, Sampling(temperature=0), 8))
    first, tokens = 0.0, 0
    while engine.busy:
        for piece in engine.step():
            first, tokens = first or time.perf_counter() - began, piece.prompt_tokens
    while engine.tend():
        pass
    return tokens, 1e3 * first
