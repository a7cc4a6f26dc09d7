"""Measures the engine process with a real model: what serving notices of background work, and what learning costs.

    python -m tools.bench engine [--model FILE] [--requests 30] [--json]

Some three minutes on 2 cores. Times are medians; nothing else should run meanwhile.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agentd import models
from agentd.adapt.passes.zeroth_order import EPSILON, EngineOracle
from agentd.engine.operations import Encode, Loss, Open, Operation, ScoreExamples, Tap, Use, WriteControl
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import Generate, Sampling
from agentd.errors import AgentdError
from agentd.learn.encoded import Encoded
from agentd.learn.spsa import spsa_gradient
from tools import reviews

QUESTION = "Did the reviewer like this movie? Answer positive or negative."
CHOICES = ["positive", "negative"]
EXAMPLES, STEPS = 48, 8
FIGURES = {
    "ttft_idle_ms": "time to first token, idle (ms)",
    "ttft_loss_ratio": "… while losses are computed (× idle)",
    "ttft_score_ratio": "… while examples are scored (× idle)",
    "ttft_after_swap_ms": "first token after a swap (ms)",
    "swap_ms": "the slowest of 20 swaps, files loaded before (ms)",
    "mezo_step_s": "MeZO step (s)",
    "mezo_forwards_s": "its two plain forwards (s)",
    "mezo_ratio": "MeZO step / forwards (at most 1.05)",
    "tap_tokens_per_s": "tap (tokens/s)",
    "tap_unshared": "tap without a shared prefix (tokens/s)",
    "tap_ratio": "what sharing gains (×)",
    "decode_tokens_per_s": "a greedy answer (tokens/s)",
}


def chat(key: object, text: str, max_tokens: int) -> Generate:
    return Generate(str(key), {"messages": [{"role": "user", "content": text}]}, Sampling(temperature=0), max_tokens)


def review(text: str, system: str = "You judge reviews.") -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": f"{QUESTION}\n\n{text}"}]}


class Bench:
    def __init__(self, engine: Supervisor, directory: Path, texts: list[dict[str, Any]], requests: int) -> None:
        self.engine, self.directory, self.texts, self.requests = engine, directory, texts, requests
        self.figures: dict[str, float] = {}

    async def run(self) -> dict[str, float]:
        await self.speed()
        n_tokens = await self.session(shared=True)
        idle = self.figures["ttft_idle_ms"] = await self.ttft()
        self.figures["ttft_loss_ratio"] = await self.ttft(Loss(list(range(EXAMPLES)), 0.1, 1, 0.1)) / idle
        self.figures["ttft_score_ratio"] = await self.ttft(ScoreExamples(list(range(EXAMPLES)))) / idle
        await self.mezo()
        shared = n_tokens / await self.tap()
        unshared = await self.session(shared=False) / await self.tap()
        self.figures |= {"tap_tokens_per_s": shared, "tap_unshared": unshared, "tap_ratio": shared / unshared}
        await self.swaps()
        return {name: self.figures[name] for name in FIGURES}

    async def session(self, *, shared: bool) -> int:
        """Opens a background session on the examples; returns their tokens. A number up front keeps prompts apart."""
        source, target = self.directory / "examples.jsonl", self.directory / "encoded.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for i, row in enumerate(self.texts[:EXAMPLES]):
                system = "You judge reviews." if shared else f"{i} You judge reviews."
                line = {"input": review(row["text"], system), "choices": CHOICES, "target": row["label"]}
                file.write(json.dumps(line) + "\n")
        await self.engine.call(Open())
        await self.engine.call(Encode(source, target))
        with target.open(encoding="utf-8") as lines:
            return sum(Encoded.from_json(json.loads(line)).n_tokens for line in lines)

    async def ttft(self, operation: Operation[Any, Any] | None = None) -> float:
        """Milliseconds to the first token of short chat requests that come while `operation` runs over and over."""

        async def background() -> None:
            while operation:
                await self.engine.call(operation)

        task, waits = asyncio.create_task(background()), []
        for i in range(self.requests):
            await asyncio.sleep(0.2 + 0.05 * (i % 5))
            start = time.perf_counter()
            stream = self.engine.generate(chat(f"{type(operation).__name__} {i}", self.texts[EXAMPLES + i]["text"], 4))
            await stream.__anext__()
            waits.append(1e3 * (time.perf_counter() - start))
            assert [piece async for piece in stream]
        task.cancel()
        await asyncio.wait({task})
        return statistics.median(waits)

    async def mezo(self) -> None:
        """Alternates whole steps, driven as a pass drives them, with two forwards of the same examples."""
        oracle = EngineOracle(self.engine, range(EXAMPLES), 0.1, seed=0)

        def step(number: int) -> None:
            gradient, _, _ = spsa_gradient(oracle, number, EPSILON, number)
            oracle.update(number, -1e-4 * gradient)

        steps, plain = [], []
        for number in range(STEPS):
            steps.append(await timed(asyncio.to_thread(step, number)))
            both = 0.0
            for _ in range(2):
                await self.engine.call(Use("0"))  # so that the forward computes its prefix too
                both += await timed(self.engine.call(ScoreExamples(oracle.batch(number))))
            plain.append(both)
        self.figures |= {"mezo_step_s": statistics.median(steps), "mezo_forwards_s": statistics.median(plain)}
        self.figures["mezo_ratio"] = statistics.median(t / p for t, p in zip(steps, plain, strict=True))

    async def tap(self) -> float:
        """Seconds to tap the last block's input for all examples."""
        assert self.engine.info is not None
        block, path = self.engine.info.n_layer - 1, str(self.directory / "tap")
        numbers = list(range(EXAMPLES))
        return min([await timed(self.engine.call(Tap(numbers, block, block + 1, Path(path)))) for _ in range(3)])

    async def swaps(self) -> None:
        await self.engine.call(WriteControl(self.directory / "control.gguf"))
        swaps, first = [], []
        for i in range(20):
            swaps.append(await self.engine.swap(1 - i % 2))
            first.append(1e3 * await timed(anext(self.engine.generate(chat(f"swap {i}", "Hello", 1)))))
        self.figures |= {"swap_ms": max(swaps), "ttft_after_swap_ms": statistics.median(first)}

    async def speed(self) -> None:
        rates = []
        for i in range(3):
            stream = self.engine.generate(chat(i, "Write a long story about a fox.", 96))
            first, start = await stream.__anext__(), time.perf_counter()
            n = [piece.completion_tokens async for piece in stream][-1] - first.completion_tokens
            rates.append(n / (time.perf_counter() - start))
        self.figures["decode_tokens_per_s"] = statistics.median(rates)


async def timed(work: Awaitable[Any]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


async def bench(arguments: argparse.Namespace) -> dict[str, float]:
    model = models.resolve(arguments.model) if arguments.model else models.fetch_default()
    settings = {"engine": "llamacpp", "path": str(model), "context": 2048, "slots": 4, "gpu_layers": "auto"}
    with tempfile.TemporaryDirectory() as directory:
        texts = reviews.rows()
        engine = Supervisor(
            {**settings, "threads": arguments.threads},
            lambda _: (None, Path(directory) / "control.gguf"),
            Activity(),
            revision=0,
            queue_limit=8,
            fallback=lambda error, revision: asyncio.sleep(0, 0),
        )
        await engine.start()
        try:
            return await Bench(engine, Path(directory), texts, arguments.requests).run()
        finally:
            await engine.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench engine", description=__doc__)
    parser.add_argument("--model", help="a GGUF file; the default model if not given")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the engine (default: all)")
    parser.add_argument("--requests", type=int, default=30, help="requests per time to first token (default: 30)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    try:
        figures = asyncio.run(bench(arguments))
    except AgentdError as error:
        print(error, file=sys.stderr)
        return 1
    table = Table("figure", "measured", title="the engine process")
    for name, value in figures.items():
        table.add_row(FIGURES[name], f"{value:.3g}" if value < 100 else f"{value:.0f}")
    print(json.dumps(figures, indent=2)) if arguments.json else Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
