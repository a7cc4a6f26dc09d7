"""llama.cpp serves the mapped weights; a trainer process makes adapters for the last blocks, zeroth-order steps move
control vectors in the trunk."""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import agentd
from agentd.adapt.kinds.kind import LanguageKind, PassPlan, Probing
from agentd.adapt.passes.base import Attempt, Means
from agentd.adapt.passes.contribution import AdapterContribution, Contribution, Order
from agentd.adapt.passes.imported import AdapterImport
from agentd.adapt.passes.llamacpp import AdaptationPass
from agentd.adapt.passes.progress import MemoryWatch
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning import engine_sample
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.engine_speed import engine_speed
from agentd.adapt.planning.overhead import engine_runtime, needed
from agentd.adapt.planning.setting import Setting
from agentd.budget.expectation import ZO_STEPS
from agentd.budget.footprint import TRAINER_START
from agentd.budget.model_shapes import F32, ModelShapes
from agentd.budget.planner import Choice
from agentd.config.schema import Config
from agentd.formats.gguf_header import Header
from agentd.host import machine, memory
from agentd.limits import ONE_BLOCK_BYTES
from agentd.models import ModelFile
from agentd.revision.archive import Archive

logger = logging.getLogger(__name__)


class LlamaCpp(LanguageKind):
    name = "llamacpp"
    contributions: ClassVar[Mapping[str, Mapping[str, Any]]] = {"adapter": {"method": "suffix-bp", "zo_steps": 0}}

    def __init__(self, model: ModelFile) -> None:
        super().__init__(model)
        self._compared = False  # whether that was tried

    def shapes(self, config: Config) -> ModelShapes:
        assert isinstance(self.model.header, Header)
        return ModelShapes.from_header(self.model.header)

    def probed_under(self) -> str:
        """The model, the code that builds its blocks, and the machine."""
        code = hashlib.sha256()
        for package in ("nn", "trainer", "learn"):
            for source in sorted((Path(agentd.__file__).parent / package).rglob("*.py")):
                code.update(source.read_bytes())
        libraries = [version(name) for name in ("llama-cpp-python", "torch")]
        parts = [self.model.sha256, code.hexdigest(), *libraries, *machine.identity()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    async def probe(self, config: Config, using: Probing, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Asks the trainer whether it can build this model's blocks and whether they compute what the engine's do, and
        measures the engine's speed and what a session costs it."""
        facts, shapes, sample = dict(known or {}), self.shapes(config), None
        if using.idle and not self._compared and facts.get("cosines") is None and await self._can_compare(config):
            sample, self._compared = await engine_sample.sample(using.engine, shapes.n_layer, using.folder), True
        try:
            if sample is not None or "cosines" not in facts:  # it has given no answer yet
                facts |= await using.trainer.probe(self.model.path, sample)
        finally:
            engine_sample.discard(using.folder)
        if facts["reason"]:
            logger.warning("backpropagation: %s", facts["reason"])
        if using.idle and "forward" not in facts:
            facts |= await engine_speed(using.engine, using.folder)
        if using.idle and (facts.get("engine_runtime_bytes") is None or facts.get("context") != config.context):
            reading = await asyncio.to_thread(memory.read)
            if reading.available - config.memory.reserve >= needed(shapes, config.context):
                runtime = await engine_runtime(using.engine, shapes, config.context, using.folder)
                facts |= {"engine_runtime_bytes": runtime, "context": config.context}
        return facts

    async def _can_compare(self, config: Config) -> bool:
        """Whether there is memory for a trainer with one block beside a session in the engine."""
        shapes = self.shapes(config)
        largest = min(max(shapes.block_parameters, default=0) * F32, ONE_BLOCK_BYTES)
        reading = await asyncio.to_thread(memory.read)
        return reading.available - config.memory.reserve >= needed(shapes, config.context) + TRAINER_START + largest

    def of_choice(self, choice: Choice, config: Config, data: Dataset, steps: int | str) -> Setting:
        plan = choice.plan
        zo_steps = ZO_STEPS[plan.method] if steps == "auto" else int(steps)
        learned = data.of("train")
        texts = 2 * sum(not member.choices for member in learned) > len(learned)
        return Setting(plan.method, plan.blocks, zo_steps, config.adapt.rank, choice, texts=texts)

    def make_pass(self, means: Means, plan: PassPlan[Setting], trainer: Training, memory: MemoryWatch) -> Attempt:
        return AdaptationPass(means, trainer, plan.setting, memory, plan.replan, self.model.path)

    def contribution(
        self, means: Means, plan: PassPlan[Setting], trainer: Training, memory: MemoryWatch, kind: str, order: Order
    ) -> Contribution:
        return AdapterContribution(order, means, trainer, plan.setting, memory, plan.replan, self.model.path)

    def import_pass(self, means: Means, imported: Archive) -> Attempt:
        return AdapterImport(means, imported)
