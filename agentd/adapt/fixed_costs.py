"""What a pass costs the engine on this machine whatever it works on: measured once, before the first plan is made.

A second context brings the engine's bookkeeping with it, and on a GPU the backend's own buffers. Nothing but trying
tells how much: a session like a pass's is opened on a few neutral sentences, scored, and its memory compared with what
the terms of the footprint say of exactly this session.
"""

import asyncio
import json
import logging
from pathlib import Path

from agentd.adapt.neutral import neutral_texts
from agentd.adapt.planning import workload_of
from agentd.budget import footprint, probe
from agentd.budget.architecture import Architecture
from agentd.budget.workload import Workload
from agentd.engine.protocol import BASE
from agentd.engine.supervisor import Supervisor
from agentd.errors import AgentdError

logger = logging.getLogger(__name__)

_ANSWERS = ["yes", "no"]
_EXAMPLES = 16  # fill a decode
_TEXTS = 3
_LONG = 64  # tokens of an example, about


def needed(architecture: Architecture, context: int) -> int:
    """Bytes that measuring takes, about."""
    nominal = Workload(seq_len=_LONG, tokens=_EXAMPLES * _LONG, examples=_EXAMPLES, context=context)
    return footprint.total(footprint.engine_terms(architecture, nominal, zeroth_order=False))


async def engine_runtime(engine: Supervisor, architecture: Architecture, context: int, folder: Path) -> int | None:
    """Bytes that the engine takes for a session beyond the terms of the footprint, at least `ENGINE_RUNTIME`.

    The same session takes a few MiB more or less from one time to the next, so less is not believed. None where the
    engine or the kernel does not tell. Nobody else may have a session in the engine meanwhile; `folder` must exist.
    """
    meter = probe.Meter()
    source, target = folder / "neutral.jsonl", folder / "neutral-encoded.jsonl"
    texts = neutral_texts()[:_TEXTS]
    lines = [
        {"input": {"prompt": texts[i % len(texts)]}, "choices": _ANSWERS, "target": _ANSWERS[i % 2]}
        for i in range(_EXAMPLES)
    ]
    source.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    try:
        before = _size(meter, engine)
        await engine.call("open")
        try:
            await engine.call("encode", source=str(source), target=str(target))
            await engine.call("use", weights=BASE)
            await engine.call("score", examples=list(range(_EXAMPLES)))
            await engine.call("drift", texts=texts, reference=BASE, candidate=BASE)
            after = await asyncio.to_thread(_size, meter, engine)
        finally:
            await engine.call("abandon")
        trees = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        if before is None or after is None or any("error" in tree for tree in trees):
            return None
        terms = footprint.engine_terms(architecture, workload_of(trees, context), zeroth_order=False, runtime=0)
        found = after - before - footprint.total(terms)
    except (AgentdError, OSError) as error:
        logger.info("what a session costs the engine could not be measured: %s", error)
        return None
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    logger.info("a session costs the engine %.0f MiB besides what it works on", found / footprint.MIB)
    return max(footprint.ENGINE_RUNTIME, found)


def _size(meter: probe.Meter, engine: Supervisor) -> int | None:
    return None if engine.pid is None else meter.read(engine.pid)
