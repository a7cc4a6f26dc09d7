"""The interface of an engine kind, and what the kinds that serve a language model share. Nothing here imports torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from agentd.adapt.passes.base import Attempt, Means
from agentd.adapt.passes.contribution import Contribution, Order
from agentd.adapt.passes.memory_control import Replan
from agentd.adapt.passes.progress import MemoryWatch
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.setting import NONE, Conditions, Machine, PassSetting, Setting, estimate
from agentd.budget import planner
from agentd.budget.context_length import fitted
from agentd.budget.model_shapes import F16, ModelShapes
from agentd.budget.planner import Choice, Considered
from agentd.budget.workload import Workload
from agentd.config.schema import Config
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import Conflict, NotALanguageModel, PassRefused
from agentd.host import memory as probe
from agentd.int8.header import ClassifierHeader
from agentd.learn.encoded import METRIC
from agentd.methods import FORWARD_ONLY, OF_ENGINE
from agentd.models import ModelFile
from agentd.revision import archive

S = TypeVar("S", bound=PassSetting)

_PREFIXES = 8  # what is kept of prompts beyond slots may take one part in so many of what is free


@dataclass(frozen=True)
class PassPlan(Generic[S]):
    """What a pass will do, what it works on, and how to find another setting when memory changes meanwhile."""

    setting: S
    data: Dataset
    replan: Replan


@dataclass(frozen=True)
class Probing:
    """What a machine is looked at with.

    folder  for files that are gone afterwards; it exists
    idle    no session is open in the engine and none will be meanwhile, so that it can be measured
    """

    engine: Supervisor
    trainer: Training
    folder: Path
    idle: bool


class EngineKind(ABC, Generic[S]):
    """`model` is the file that the engine serves."""

    name: ClassVar[str]
    contributions: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The kinds of what it can give a fleet, and the options of the pass that makes each."""
    in_place: ClassVar[bool] = False
    """Whether the weights themselves learn, in the engine's own process."""
    mapped: ClassVar[tuple[str, ...]] = ()
    """Processes whose weights are pages of files that come and go: of their memory only what is anonymous counts."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model

    def fitted(self, config: Config) -> Config:
        """The same configuration, with what depends on the model and on the memory that is free now."""
        return config

    def settings(self, config: Config) -> dict[str, Any]:
        """What the engine's process is started with, see engine/process/runner.py."""
        return {
            "engine": self.name,
            "path": str(self.model.path),
            "context": config.context,
            "slots": config.serve.slots,
            "threads": config.model_threads,
            "gpu_layers": config.model.gpu_layers,
        }

    def probed_under(self) -> str | None:
        """What the facts of `probe` depend on, hashed; None where they cost nothing and are not worth keeping. Reads
        files."""
        return None

    async def probe(self, config: Config, using: Probing, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """What this machine can do for a pass, and what that costs: {"supported", "reason", ...}, see `Machine`.

        known  what it was an earlier time, under the same `probed_under`; it is not measured again
        """
        if self.in_place:
            return {"supported": False, "reason": f"engine {self.name} learns in place, without a trainer"}
        return {"supported": True}

    def shapes(self, config: Config) -> ModelShapes:
        """The model's shapes as this engine serves them. Raises NotALanguageModel."""
        raise NotALanguageModel(self.model.name, "`agentctl adapt --dry-run` shows what a pass of it would take")

    def considered(
        self,
        config: Config,
        workload: Workload,
        options: dict[str, Any],
        machine: Machine,
        budget: int,
        conditions: Conditions = NONE,
    ) -> tuple[Considered, ...]:
        """Every plan of the planner that the options allow, the best first.

        Raises NotALanguageModel, PassRefused where the options cannot be met at all.
        """
        method = options.get("method", config.adapt.method)
        if options.get("objective", config.adapt.objective) == METRIC:
            method = "mezo" if method == "auto" else method
            if method not in FORWARD_ONLY:
                why = f"{method} learns by backpropagation, and objective metric has no derivative"
                known = [name for name in FORWARD_ONLY if name in OF_ENGINE[self.name]]
                raise PassRefused(f"{why}; use {', '.join(known)}, or objective likelihood")
        return planner.consider(
            self.shapes(config),
            workload,
            budget=budget,
            method=method,
            blocks=options.get("blocks", config.adapt.blocks),
            in_place=self.in_place,
            overruns=conditions.overruns,
            **machine.as_arguments(),
        )

    @abstractmethod
    def setting(
        self,
        config: Config,
        data: Dataset,
        options: dict[str, Any],
        machine: Machine,
        conditions: Conditions = NONE,
    ) -> S:
        """The best setting that fits. Raises PassRefused: with the shortfall in bytes where memory is missing.

        options     override the configuration
        conditions  what a running pass knows besides
        """

    @abstractmethod
    def make_pass(self, means: Means, plan: PassPlan[S], trainer: Training, memory: MemoryWatch) -> Attempt: ...

    def contribution(
        self, means: Means, plan: PassPlan[S], trainer: Training, memory: MemoryWatch, kind: str, order: Order
    ) -> Contribution:
        """The pass that makes a contribution of this kind, one of `contributions`."""
        raise Conflict(f"engine {self.name} has nothing to give a fleet")

    def dtype(self, engine: Supervisor) -> str:
        """What weights that learn are served in, where bits depend on it; else nothing."""
        return ""

    def import_pass(self, means: Means, imported: archive.Archive) -> Attempt:
        """The pass that judges what another device learned."""
        raise Conflict(f"engine {self.name} takes nothing in that another device learned")

    def check_import(self, imported: archive.Archive, engine: Supervisor) -> None:
        """Raises Conflict where it does not fit this engine and its model."""
        archive.refuse_other_base(imported, self.model.sha256, self.name)


class LanguageKind(EngineKind[Setting]):
    """A kind whose settings are plans of the planner."""

    cached_bytes: ClassVar[int] = F16
    """Of a value in a cache."""

    def __init__(self, model: ModelFile) -> None:
        super().__init__(model)
        self._prefixes = 0

    def fitted(self, config: Config) -> Config:
        """What serving takes besides contexts has its memory first: contexts and passes get of the rest."""
        assert not isinstance(self.model.header, ClassifierHeader)
        shapes, trained = self.shapes(config), self.model.header.context_length
        free = probe.read().available - config.memory.reserve - shapes.weight_bytes - self.serving_bytes(config)
        self._prefixes = min(config.serve.prefixes.memory, max(0, free) // _PREFIXES)
        slots, each = config.serve.slots, self.cached_bytes
        return config.fitted(fitted(shapes, trained, slots, free - self._prefixes, each))

    def settings(self, config: Config) -> dict[str, Any]:
        prefixes = {
            "folder": str(config.state.dir / "prefixes"),
            "memory": self._prefixes,
            "disk": config.serve.prefixes.disk if self._prefixes else 0,
            "key": self.model.sha256,
        }
        return {**super().settings(config), "prefixes": prefixes}

    def serving_bytes(self, config: Config) -> int:
        """What serving takes besides weights, caches and prefixes, as far as it depends on the model."""
        return 0

    def setting(
        self,
        config: Config,
        data: Dataset,
        options: dict[str, Any],
        machine: Machine,
        conditions: Conditions = NONE,
    ) -> Setting:
        limit = min((size for size in (config.memory.limit, conditions.ceiling) if size is not None), default=None)
        available, reserve = probe.read().available + conditions.held, config.memory.reserve
        budget = planner.budget_of(available, reserve, limit)
        considered = self.considered(
            config, conditions.workload or estimate(config, data), options, machine, budget, conditions
        )
        for each in considered:
            if each.fits:
                choice = Choice(each.plan, budget, available, reserve, considered)
                return self.of_choice(choice, config, data, options.get("zo_steps", config.adapt.zo_steps))
        raise planner.refusal(considered, available=available, reserve=reserve, limit=limit)

    @abstractmethod
    def of_choice(self, choice: Choice, config: Config, data: Dataset, steps: int | str) -> Setting:
        """The setting that follows this choice; `steps` of zeroth order are what was asked for, or `auto`."""
