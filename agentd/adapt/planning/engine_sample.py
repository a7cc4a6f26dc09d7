"""A sample of what the engine computes, for the trainer to compare its own blocks with (trainer/agreement.py)."""

import contextlib
import json
import logging
from pathlib import Path

from agentd.adapt.gate.drift_corpus import drift_corpus
from agentd.engine.operations import Abandon, Encode, Open, ScoreExamples, Tap, Use
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import BASE
from agentd.errors import AgentdError

logger = logging.getLogger(__name__)

ANSWERS = ["yes", "no", "The", "one", "42", "red", "(", "are"]
_FILES = ("agreement.jsonl", "agreement-encoded.jsonl", "agreement.f32", "agreement.json")
_CHARACTERS = 120  # of a text: some thirty tokens


def discard(folder: Path) -> None:
    """Removes what `sample` wrote to `folder`."""
    for name in _FILES:
        with contextlib.suppress(OSError):  # on a disk that fails they are left, and written over next time
            (folder / name).unlink()


async def sample(engine: Supervisor, n_layer: int, folder: Path) -> Path | None:
    """Writes what enters every block for a few tokens, and how likely some answers are. `folder` must exist, and no one
    else may have a session in the engine meanwhile. None where the engine cannot tell."""
    source, encoded, tap, path = (folder / name for name in _FILES)
    text = drift_corpus()[0][:_CHARACTERS]
    line = {"input": {"prompt": text}, "choices": ANSWERS, "target": ANSWERS[0]}
    try:
        source.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
        await engine.call(Open())
        try:
            await engine.call(Encode(source, encoded))
            await engine.call(Use(BASE))
            index = await engine.call(Tap([0], 0, n_layer, tap))
            (scores,) = await engine.call(ScoreExamples([0]))
        finally:
            await engine.call(Abandon())
        tree = json.loads(encoded.read_text(encoding="utf-8"))
        if "error" in tree:
            return None
        likelihoods = {"choices": scores.choices, "target": scores.target}
        place = {"tap": str(tap), "prefix": index.prefix_rows, "start": index.starts[0]}
        path.write_text(json.dumps({"encoded": tree, **place, **likelihoods}), encoding="utf-8")
    except (AgentdError, OSError) as error:
        logger.info("what the engine computes in each block could not be tapped: %s", error)
        return None
    return path
