"""A small integer classifier that learns in the engine's own process, in integers."""

import math
from typing import Any

from agentd.adapt.kinds.kind import EngineKind, PassPlan
from agentd.adapt.passes.base import Attempt, Means
from agentd.adapt.passes.int8 import BATCH, ClassifierPass, ClassifierSetting
from agentd.adapt.passes.progress import MemoryWatch
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.setting import NONE, Conditions, Machine
from agentd.budget.planner import budget_of
from agentd.config.schema import Config
from agentd.errors import PassRefused
from agentd.host import memory
from agentd.int8 import step_memory
from agentd.int8.header import ClassifierHeader
from agentd.learn.encoded import LIKELIHOOD

STEPS = 600
# Measured on x86-64 with torch 2.13 and LeNet-5: what the engine's process grows by in its first pass beyond the terms
# that can be counted; code paged in, allocator, Python's objects.
RUNTIME = 12 << 20
_EXAMPLE = 6000  # bytes an example takes in Python objects besides its mantissas


class Int8(EngineKind[ClassifierSetting]):
    name = "int8"

    def settings(self, config: Config) -> dict[str, Any]:
        """By default one thread: a layer takes less time than waking another thread does."""
        threads = 1 if config.model.threads == "auto" else config.model.threads
        return {**super().settings(config), "threads": threads}

    def setting(
        self,
        config: Config,
        data: Dataset,
        options: dict[str, Any],
        machine: Machine,
        conditions: Conditions = NONE,
    ) -> ClassifierSetting:
        assert self.model.classifier is not None
        return plan(config, self.model.classifier, data, options, conditions.held)

    def make_pass(
        self, means: Means, plan: PassPlan[ClassifierSetting], trainer: Training, memory: MemoryWatch
    ) -> Attempt:
        return ClassifierPass(means, plan.setting)


def plan(
    config: Config, header: ClassifierHeader, data: Dataset, options: dict[str, Any], held: int = 0
) -> ClassifierSetting:
    """The setting with the most layers under backpropagation that fits the memory there is, within what was asked for.

    Raises PassRefused: with a shortfall in bytes where memory is missing, with 0 where the wish cannot be met.
    """
    layers = len(header.network.trained_layers())
    if options.get("objective", config.adapt.objective) != LIKELIHOOD:
        raise PassRefused("a classifier learns by objective likelihood alone")
    method = str(options.get("method", config.adapt.method))
    blocks = options.get("blocks", config.adapt.blocks)
    steps = options.get("zo_steps", config.adapt.zo_steps)
    available = memory.read().available + held
    budget = budget_of(available, config.memory.reserve, config.memory.limit)
    settings = [
        ClassifierSetting(
            name, k, STEPS if steps == "auto" else int(steps), _predicted(header, data, k), budget, layers
        )
        for name, k in _wished(method, blocks, layers)
    ]
    for setting in settings:
        if setting.needed <= budget:
            return setting
    smallest = min(settings, key=lambda setting: setting.needed)
    shortfall = smallest.needed - budget
    raise PassRefused(
        f"{smallest.method} with k = {smallest.blocks} needs {smallest.needed} bytes, and {budget} are free beyond "
        f"memory.reserve: {shortfall} short",
        shortfall,
    )


def _wished(method: str, blocks: int | str, layers: int) -> list[tuple[str, int]]:
    """(method, k) in the order of preference: the more layers learn by backpropagation the better."""
    if method not in ("auto", "mezo", "elasticzo", "suffix-bp"):
        raise PassRefused(f"a classifier has no method {method!r}; there are mezo, elasticzo and suffix-bp")
    if blocks != "auto" and not 0 <= int(blocks) <= layers:
        raise PassRefused(f"{blocks} layers were asked for, and the model has {layers}")
    every = [("suffix-bp", layers), *(("elasticzo", k) for k in range(layers - 1, 0, -1)), ("mezo", 0)]
    every += [("suffix-bp", k) for k in range(layers - 1, 0, -1)]
    candidates = [(m, k) for m, k in every if method in ("auto", m) and (blocks == "auto" or k == int(blocks))]
    if not candidates:
        raise PassRefused(f"{method} does not go with k = {blocks} of {layers} layers")
    return candidates


def _predicted(header: ClassifierHeader, data: Dataset, k: int) -> dict[str, int]:
    network = header.network
    return {
        "runtime": RUNTIME,
        "networks": 4 * network.size,  # the candidate, the best so far, the replay and the staged one
        "step": step_memory.step_bytes(network, BATCH, k, int8=True),
        "examples": len(data.members) * (2 * math.prod(network.input) + _EXAMPLE),
    }
