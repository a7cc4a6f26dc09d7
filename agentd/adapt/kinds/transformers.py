"""Torch serves a module whose own weights learn in place, in the engine's process; a revision is a ledger of steps."""

from collections.abc import Mapping
from typing import Any, ClassVar

from agentd.adapt.kinds.kind import LanguageKind, PassPlan
from agentd.adapt.passes.base import Attempt, Means
from agentd.adapt.passes.contribution import Contribution, LedgerContribution, LowRankContribution, Order
from agentd.adapt.passes.imported import WeightsImport
from agentd.adapt.passes.progress import MemoryWatch
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.passes.transformers import InPlacePass, InPlaceSetting
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.setting import Setting
from agentd.budget.expectation import in_place_steps
from agentd.budget.in_place import joint_bytes, served_shapes
from agentd.budget.model_shapes import F32, ModelShapes
from agentd.budget.planner import Choice
from agentd.config.schema import Config
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import Conflict
from agentd.int8.header import ClassifierHeader
from agentd.revision.archive import Archive, WeightsArchive


class Transformers(LanguageKind):
    name = "transformers"
    contributions: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ledger": {"method": "mezo"},
        "adapter": {"method": "lora"},
    }
    in_place = True
    mapped = ("engine",)
    cached_bytes = F32

    def settings(self, config: Config) -> dict[str, Any]:
        state = config.state.dir
        own = {"folder": str(state / "weights"), "revisions": str(state / "revisions")}
        return {**super().settings(config), **own, "key": self.model.sha256, "dtype": config.model.dtype}

    def shapes(self, config: Config) -> ModelShapes:
        assert not isinstance(self.model.header, ClassifierHeader)
        return served_shapes(self.model.header, config.model.dtype)

    def serving_bytes(self, config: Config) -> int:
        return joint_bytes(self.shapes(config), config.serve.slots)

    def of_choice(self, choice: Choice, config: Config, data: Dataset, steps: int | str) -> Setting:
        plan, rank = choice.plan, config.adapt.rank
        is_bp = plan.method in ("bp", "lora")
        if steps == "auto" or is_bp:
            steps = in_place_steps(plan.method, plan.blocks, len(data.of("train")))
        return Setting(plan.method, plan.blocks, 0 if is_bp else int(steps), rank, choice, int(steps))

    def make_pass(self, means: Means, plan: PassPlan[Setting], trainer: Training, memory: MemoryWatch) -> Attempt:
        setting = plan.setting
        return InPlacePass(means, self._in_place(setting, means.engine))

    def contribution(
        self, means: Means, plan: PassPlan[Setting], trainer: Training, memory: MemoryWatch, kind: str, order: Order
    ) -> Contribution:
        made = LedgerContribution if kind == "ledger" else LowRankContribution
        return made(order, means, self._in_place(plan.setting, means.engine))

    def dtype(self, engine: Supervisor) -> str:
        return _dtype(engine)

    @staticmethod
    def _in_place(setting: Setting, engine: Supervisor) -> InPlaceSetting:
        return InPlaceSetting.of(setting.method, setting.blocks, setting.steps, _dtype(engine), setting.rank)

    def check_import(self, imported: Archive, engine: Supervisor) -> None:
        super().check_import(imported, engine)
        assert isinstance(imported, WeightsArchive)
        if imported.dtype != (dtype := _dtype(engine)):
            raise Conflict(
                f"it was learned in {imported.dtype}, and this device serves {dtype}; set model.dtype: {imported.dtype}"
            )

    def import_pass(self, means: Means, imported: Archive) -> Attempt:
        assert isinstance(imported, WeightsArchive)
        return WeightsImport(means, imported)


def _dtype(engine: Supervisor) -> str:
    """The type of the weights, from what the engine says that it has loaded."""
    assert engine.info is not None
    return "bfloat16" if engine.info.size_bytes < 3 * engine.info.n_params else "float32"
