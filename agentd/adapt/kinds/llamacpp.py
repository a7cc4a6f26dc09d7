"""llama.cpp serves the mapped weights; a trainer process makes adapters for the last blocks, zeroth-order steps move
control vectors in the trunk."""

import asyncio
import hashlib
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import agentd
from agentd.adapt.kinds.kind import LanguageKind, PassPlan
from agentd.adapt.passes.base import Attempt, Means
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
from agentd.engine.process.supervisor import Supervisor
from agentd.formats.gguf_header import Header
from agentd.host import machine, memory
from agentd.models import ModelFile
from agentd.revision.archive import Archive

logger = logging.getLogger(__name__)

_PREFIXES = 8  # what is kept of prompts beyond slots may take one part in so many of what is free


class LlamaCpp(LanguageKind):
    name = "llamacpp"

    def __init__(self, model: ModelFile) -> None:
        super().__init__(model)
        self._probed: dict[str, Any] | None = None
        self._measured = self._compared = False
        self._prefixes = 0

    def shapes(self, config: Config) -> ModelShapes:
        assert isinstance(self.model.header, Header)
        return ModelShapes.from_header(self.model.header)

    def fitted(self, config: Config) -> Config:
        """Prefixes have their memory first: contexts and passes get of the rest."""
        free = max(0, memory.read().available - config.memory.reserve - self.shapes(config).weight_bytes)
        self._prefixes = min(config.serve.prefixes.memory, free // _PREFIXES)
        return super().fitted(config)

    def reserved(self, config: Config) -> int:
        return self._prefixes

    def settings(self, config: Config) -> dict[str, Any]:
        prefixes = {
            "folder": str(config.state.dir / "prefixes"),
            "memory": self._prefixes,
            "disk": config.serve.prefixes.disk if self._prefixes else 0,
            "key": self.model.sha256,
        }
        return {**super().settings(config), "prefixes": prefixes}

    def probed_under(self) -> str:
        """The model, the code that builds its blocks, and the machine."""
        code = hashlib.sha256()
        for package in ("nn", "trainer", "learn"):
            for source in sorted((Path(agentd.__file__).parent / package).rglob("*.py")):
                code.update(source.read_bytes())
        libraries = [version(name) for name in ("llama-cpp-python", "torch")]
        parts = [self.model.sha256, code.hexdigest(), *libraries, *machine.identity()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    async def probe(
        self,
        config: Config,
        engine: Supervisor,
        trainer: Training,
        folder: Path,
        *,
        engine_is_free: bool,
        known: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Asks the trainer whether it can build this model's blocks and whether they compute what the engine's do, and
        measures the engine's speed and what a session costs it: each once."""
        if self._probed is None and known is not None and "cosines" in known:
            self._probed, self._compared = known, known["cosines"] is not None
            self._measured = known.get("engine_runtime_bytes") is not None and known["context"] == config.context
        sample = None
        if engine_is_free and not self._compared and await self._can_compare(config):
            sample, self._compared = await engine_sample.sample(engine, self.shapes(config).n_layer, folder), True
        try:
            if self._probed is None or sample is not None or "cosines" not in self._probed:  # it gave no answer
                self._probed = {**(self._probed or {}), **await trainer.probe(self.model.path, sample)}
        finally:
            engine_sample.discard(folder)
        if engine_is_free and "forward" not in self._probed:
            self._probed.update(await engine_speed(engine, folder))
        if self._probed["reason"]:
            logger.warning("backpropagation: %s", self._probed["reason"])
        if engine_is_free and not self._measured:
            shapes, context = self.shapes(config), config.context
            reading = await asyncio.to_thread(memory.read)
            if reading.available - config.memory.reserve >= needed(shapes, context):
                self._probed["engine_runtime_bytes"] = await engine_runtime(engine, shapes, context, folder)
                self._probed["context"], self._measured = context, True
        return self._probed

    async def _can_compare(self, config: Config) -> bool:
        """Whether there is memory for a trainer with one block beside a session in the engine."""
        shapes = self.shapes(config)
        largest = max(shapes.block_parameters, default=0) * F32
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

    def import_pass(self, means: Means, imported: Archive) -> Attempt:
        return AdapterImport(means, imported)
