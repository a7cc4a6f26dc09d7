"""What every pass costs the engine on this machine: measured once, before the first plan is made.

A second context brings the engine's bookkeeping with it, and on a GPU the backend's own buffers. Nothing but trying
tells how much: a session like a pass's is opened on a few sentences of the drift corpus, scored, and its memory
compared with what the terms of the footprint say of exactly this session.
"""

import json
import logging
from pathlib import Path

from agentd.adapt.gate.drift_corpus import drift_corpus
from agentd.adapt.planning.setting import workload_of
from agentd.budget import footprint
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.workload import Workload
from agentd.engine.operations import Abandon, Drift, Encode, Open, ScoreExamples, Use
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import BASE
from agentd.errors import AgentdError
from agentd.host import memory
from agentd.learn.encoded import Encoded

logger = logging.getLogger(__name__)

_ANSWERS = ["yes", "no"]
_EXAMPLES = 16  # fill a decode
_TEXTS = 3
_LONG = 64  # tokens of an example, about
_SPREAD = 3 * footprint.MIB  # by which the same session differs from one time to the next
_LEAST = 6 * footprint.MIB  # less is not believed


def needed(architecture: ModelShapes, context: int) -> int:
    """Bytes that measuring takes, about."""
    nominal = Workload(seq_len=_LONG, tokens=_EXAMPLES * _LONG, examples=_EXAMPLES, context=context)
    return footprint.total(footprint.engine_terms(architecture, nominal, zeroth_order=False))


async def engine_runtime(engine: Supervisor, architecture: ModelShapes, context: int, folder: Path) -> int | None:
    """Bytes that the engine takes for a session beyond the terms of the footprint, `_SPREAD` included.

    None where the engine or the kernel does not tell. No one else may have a session in the engine meanwhile; `folder`
    must exist.
    """
    source, target = folder / "corpus.jsonl", folder / "corpus-encoded.jsonl"
    texts = drift_corpus()[:_TEXTS]
    lines = [
        {"input": {"prompt": texts[i % len(texts)]}, "choices": _ANSWERS, "target": _ANSWERS[i % 2]}
        for i in range(_EXAMPLES)
    ]
    source.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    try:
        before = _size(engine)
        await engine.call(Open())
        try:
            await engine.call(Encode(source, target))
            await engine.call(Use(BASE))
            await engine.call(ScoreExamples(list(range(_EXAMPLES))))
            await engine.call(Drift(texts, BASE, BASE))
            after = _size(engine)
        finally:
            await engine.call(Abandon())
        trees = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        if before is None or after is None or any("error" in tree for tree in trees):
            return None
        terms = footprint.engine_terms(
            architecture,
            workload_of([Encoded.from_json(tree) for tree in trees], context, rank=0),
            zeroth_order=False,
            runtime=0,
        )
        extra = after - before - footprint.total(terms)
    except (AgentdError, OSError) as error:
        logger.info("what a session costs the engine could not be measured: %s", error)
        return None
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    logger.info("a session costs the engine %.0f MiB besides what it works on", extra / footprint.MIB)
    return max(_LEAST, extra + _SPREAD)


def _size(engine: Supervisor) -> int | None:
    """Resident, shared pages in full: what they are divided by changes when another process opens the same model."""
    return None if engine.pid is None else memory.rss(engine.pid)
