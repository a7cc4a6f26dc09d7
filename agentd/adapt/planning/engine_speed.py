"""How fast the engine is with this model on this machine: what a plan's time follows from."""

import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from agentd.adapt.gate.drift_corpus import drift_corpus
from agentd.engine.operations import Abandon, Encode, Open, ScoreExamples, Use
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import BASE, Generate, Sampling
from agentd.errors import AgentdError

logger = logging.getLogger(__name__)

_CHARACTERS = 200  # of a text: some fifty tokens
_TEXTS = 8
_SOON = 1.0  # seconds for two texts; slower engines are measured well enough by these
_ANSWER = 24  # tokens that are generated to be timed
_TRIES = 3  # where requests come meanwhile, which go first, and where others compute


async def engine_speed(engine: Supervisor, folder: Path) -> dict[str, float]:
    """Tokens per second: `forward` of scoring many short texts at once, `answer` of generating one; what could not be
    measured is not there. No one else may have a session in the engine meanwhile; `folder` must exist."""
    rates: dict[str, float] = {}
    try:
        rates["forward"] = await fastest(lambda: _forward(engine, folder), lambda: engine.requests)
        if answer := await fastest(lambda: _answer(engine), lambda: engine.requests, own=1):
            rates["answer"] = answer
    except (AgentdError, OSError) as error:
        logger.info("how fast the engine is could not be measured: %s", error)
    return rates


async def fastest(measure: Callable[[], Awaitable[float]], requests: Callable[[], int], own: int = 0) -> float:
    """What was measured while no one else asked anything, or else the largest of a few tries.

    requests  counts all that have come so far, of which a measurement makes `own` itself
    """
    best = 0.0
    for _ in range(_TRIES):
        before = requests()
        best = max(best, await measure())
        if requests() == before + own:
            break
    return best


async def _answer(engine: Supervisor) -> float:
    """0 where nothing much was said."""
    text = drift_corpus()[0][:_CHARACTERS]
    request = Generate("speed", {"prompt": text}, Sampling(temperature=0, seed=0), _ANSWER, private=True)
    times = [time.monotonic() async for piece in engine.generate(request) if piece.text or piece.logprobs]
    return (len(times) - 1) / max(times[-1] - times[0], 1e-6) if len(times) > 2 else 0.0  # from the first to the last


async def _forward(engine: Supervisor, folder: Path) -> float:
    source, target = folder / "speed.jsonl", folder / "speed-encoded.jsonl"
    texts = [text[:_CHARACTERS] for text in drift_corpus()[:_TEXTS]]
    lines = [{"input": {"prompt": text}, "choices": [" yes", " no"], "target": " yes"} for text in texts]
    try:
        source.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        await engine.call(Open())
        try:
            await engine.call(Encode(source, target))
            await engine.call(Use(BASE))
            trees = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
            usable = [i for i, tree in enumerate(trees) if "error" not in tree]
            best = 0.0
            # At first pages of the file come in; and who else computes on this machine does not do so all the time.
            for some in (usable[:2], *[usable] * _TRIES):
                tokens = sum(len(trees[i]["shared"]) + sum(map(len, trees[i]["own"])) for i in some)
                begin = time.monotonic()
                await engine.call(ScoreExamples(some))
                seconds = time.monotonic() - begin
                best = max(best, tokens / max(seconds, 1e-6))
                if seconds > _SOON:
                    break
            return best
        finally:
            await engine.call(Abandon())
    finally:
        for path in (source, target):
            path.unlink(missing_ok=True)
