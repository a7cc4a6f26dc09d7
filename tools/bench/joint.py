"""Several clients of engine transformers: their tokens in one forward, and one by one as before, in turns in one run.

    python -m tools.bench joint [--model FILE] [--dtype bfloat16] [--clients 1,4,8] [--tokens 24] [--rounds 3] [--json]

Every client sends a question of its own (some 60 tokens) at the same moment. The rate is that of all answers' tokens
after the first one of each, in all; the first token is a client's mean. `beside` is a client that is being answered
while another one's prompt of some 1,000 tokens is read: the longest time between two of its tokens. `prefix` is the
first token behind a system prompt of some 500 tokens when the slots hold something else, with a prefix store and
without. Medians over the rounds.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from agentd import models
from agentd.engine.protocol import Generate, Sampling
from agentd.engine.transformers.engine import TransformersEngine
from agentd.host.cpu import cores

SEA = "Tell me of the sea, of the wind and of the lighthouse. "
TOOLS = "".join(f"Tool {i} turns lamp {i} on and off, and says how it is. " for i in range(28))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", default="1,4,8")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    numbers = [int(each) for each in arguments.clients.split(",")]
    with tempfile.TemporaryDirectory() as name:
        engine = start(arguments.model or models.fetch_default(), Path(name), max(numbers), arguments.dtype)
        lines = [compared(engine, n, arguments.tokens, arguments.rounds) for n in numbers]
        lines += [beside(engine, arguments.rounds), prefixes(engine, arguments.rounds)]
        engine.close()
    if arguments.json:
        print(json.dumps(lines, indent=1))
        return 0
    shown = Table("what", "one by one, or without", "together, or with")
    for line in lines:
        shown.add_row(line["what"], line["before"], line["after"])
    Console().print(shown)
    return 0


def start(model: Path, folder: Path, slots: int, dtype: str) -> TransformersEngine:
    kept = {"folder": str(folder / "prefixes"), "memory": 1 << 28, "disk": 0, "key": "bench"}
    return TransformersEngine(
        model,
        folder=folder / "weights",
        key="bench" * 4,
        context=2048,
        slots=slots,
        threads=cores(),
        dtype=dtype,
        prefixes=kept,
    )


def ask(key: object, text: str, tokens: int, system: str = "") -> Generate:
    messages = [{"role": "system", "content": system}] if system else []
    free = Sampling(temperature=0, logit_bias=((2, -100.0),))  # it goes on to its last token
    return Generate(str(key), {"messages": [*messages, {"role": "user", "content": text}]}, free, tokens)


def run(engine: TransformersEngine, clients: int, tokens: int) -> tuple[float, float]:
    """Tokens a second in all, and seconds to a first token."""
    engine.forget(None)
    began = time.perf_counter()
    first: dict[str, float] = {}
    for client in range(clients):
        engine.submit(ask(client, f"{client}. {4 * SEA}", tokens))
    since, n = 0.0, 0
    while engine.busy:
        pieces = engine.step()
        now = time.perf_counter() - began
        if len(first) == clients:
            n += len(pieces)
        for piece in pieces:
            first.setdefault(piece.key, now)
        if len(first) == clients and not since:
            since = now
    return n / (time.perf_counter() - began - since), mean(first.values())


def compared(engine: TransformersEngine, clients: int, tokens: int, rounds: int) -> dict[str, Any]:
    context: Any = engine._context
    results: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for joins in [False, True] * (rounds + 1):
        context.joins = joins
        results[joins].append(run(engine, clients, tokens))
    figures = {joins: [median(each) for each in zip(*some[1:], strict=True)] for joins, some in results.items()}
    said = {joins: f"{rate:.1f} tokens/s, first after {first:.2f} s" for joins, (rate, first) in figures.items()}
    return {"what": f"{clients} clients", "before": said[False], "after": said[True], "figures": list(figures.values())}


def beside(engine: TransformersEngine, rounds: int) -> dict[str, Any]:
    """What a client that is being answered notices of a long prompt."""
    longest: list[float] = []
    alone: list[float] = []
    for _ in range(rounds):
        engine.forget(None)
        engine.submit(ask("short", "Hm?", 99))
        while not engine.step():
            pass
        times = [time.perf_counter()]
        for _ in range(8):
            engine.step()
            times.append(time.perf_counter())
        alone.append((times[-1] - times[0]) / 8)
        engine.submit(ask("long", 80 * SEA, 1))
        times, keys = times[-1:], set[str]()
        while "long" not in keys:
            keys = {piece.key for piece in engine.step()}
            times.append(time.perf_counter())  # there is a token of the short one in every step
        longest.append(max(after - before for before, after in pairwise(times)))
        engine.cancel("short")
    said = f"at most {median(longest):.2f} s between two of its tokens"
    return {"what": "beside", "before": f"alone a token every {median(alone):.2f} s", "after": said}


def prefixes(engine: TransformersEngine, rounds: int) -> dict[str, Any]:
    """The first token behind what others began with, when the slots hold something else."""
    found: dict[bool, list[float]] = {False: [], True: []}
    serving: Any = engine._serving
    store = serving._prefixes
    for kept in [False, True] * rounds:
        engine.forget(None)
        serving._prefixes = store if kept else None
        for round, system in enumerate((TOOLS, "")):
            for i in range(len(serving._slots) if round else 1):
                engine.submit(ask(f"{round} {i}", f"{i}. {16 * SEA}", 1, system))
            while engine.busy:
                engine.step()
        began = time.perf_counter()
        engine.submit(ask("last", "Which lamp is on?", 1, TOOLS))
        while not engine.step():
            pass
        found[kept].append(time.perf_counter() - began)
    serving._prefixes = store
    said = {kept: f"first after {median(each):.2f} s" for kept, each in found.items()}
    return {"what": "prefix", "before": said[False], "after": said[True]}


if __name__ == "__main__":
    sys.exit(main())
