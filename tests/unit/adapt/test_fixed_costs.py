"""What every session costs the engine: measured on a real one, which is as it was afterwards."""

import asyncio
from dataclasses import replace
from pathlib import Path

from agentd.adapt.planning.overhead import engine_runtime
from agentd.budget.footprint import ENGINE_RUNTIME, MIB
from agentd.budget.model_shapes import ModelShapes
from agentd.engine.process.activity import Activity
from agentd.formats.gguf_header import read_header
from tools.bench.parts import supervisor


def test_a_session_is_measured_and_closed(real_model: Path, tmp_path: Path) -> None:
    shapes = ModelShapes.from_header(read_header(real_model))

    async def run() -> list[int | None]:
        engine = supervisor(real_model, Activity())
        await engine.start()
        sizes = [await engine_runtime(engine, shapes, 2048, tmp_path)]
        # By the terms of a model with a small vocabulary the real one's logits are a fixed cost.
        sizes.append(await engine_runtime(engine, replace(shapes, n_vocab=100), 2048, tmp_path))
        await engine.stop()
        return [*sizes, await engine_runtime(engine, shapes, 2048, tmp_path)]

    first, without_logits, dead = asyncio.run(run())
    assert first is not None
    assert without_logits is not None
    assert MIB < first < ENGINE_RUNTIME + 50 * MIB
    assert without_logits > first
    assert dead is None, "an engine that is not there was measured"
    assert list(tmp_path.iterdir()) == []
