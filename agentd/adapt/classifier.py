"""How a classifier learns in a pass: inside the engine, in integers. All else is the same as in any other pass.

The dial is the cutoff of ElasticZO-INT8: the last k layers learn by integer backpropagation, those below by
zeroth-order steps (`elasticzo`), or not at all (`suffix-bp`, which with all layers is full backpropagation); k = 0 is
`mezo`.
"""

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.adapt.attempt import CANDIDATE, Attempt, Means
from agentd.adapt.dataset import Dataset
from agentd.adapt.revision_files import LEDGER, NETWORK
from agentd.adapt.trial import Trial
from agentd.budget import probe
from agentd.config import Config
from agentd.errors import PassRefused
from agentd.learn.int8 import memory
from agentd.safetensors_header import ClassifierHeader

BATCH = 32
STEPS = 600
NOISE = (7, 32)  # r_max and density of the perturbations
# Schedules over a pass. Tuned on 434 rotated training images of Fashion-MNIST, judged on other training images: BP with
# (3, 2, 1) reached 74.2 %, with these 77.2 %; the last two layers by BP 72.5 % and 73.4 %.
ZO_BITS = (1, 0, -1)
BP_BITS = (2, 1, 0, -1)
# Measured on x86-64 with torch 2.13 and LeNet-5: what the engine's process grows by in its first pass beyond the terms
# that can be counted; code paged in, allocator, Python's objects.
RUNTIME = 12 << 20
_EXAMPLE = 6000  # bytes an example takes in Python objects besides its mantissas
_PATIENCE = 30.0  # seconds a canary may take
_KEPT_STEPS = 200  # rows of a pass's steps at the most


@dataclass(frozen=True)
class ClassifierSetting:
    """What a pass will do: k = `blocks` layers by backpropagation, and the bytes that is predicted to take."""

    method: str
    blocks: int
    steps: int
    predicted: dict[str, int]
    budget: int
    layers: int

    @property
    def needed(self) -> int:
        return sum(self.predicted.values())

    @property
    def frozen(self) -> bool:
        return self.method == "suffix-bp"

    @property
    def has_zo(self) -> bool:
        return not self.frozen and self.blocks < self.layers

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "blocks": self.blocks,
            "zo_steps": self.steps if self.has_zo else 0,
            "steps": self.steps,
            "batch": BATCH,
            "needed_bytes": self.needed,
            "budget_bytes": self.budget,
            "why": f"{self.method} with k = {self.blocks} of {self.layers} layers needs {self.needed / 1e6:.1f} MB of "
            f"the {self.budget / 1e6:.1f} MB there are",
        }


def plan(config: Config, header: ClassifierHeader, data: Dataset, options: dict[str, Any]) -> ClassifierSetting:
    """The setting with the most layers under backpropagation that fits the memory there is, within what was asked for.

    Raises PassRefused: with a shortfall in bytes where memory is missing, with 0 where the wish cannot be met.
    """
    layers = len(header.network.trained_layers())
    method = str(options.get("method", config.adapt.method))
    blocks = options.get("blocks", config.adapt.blocks)
    steps = options.get("zo_steps", config.adapt.zo_steps)
    available = probe.read().available
    budget = max(0, available - config.memory.reserve)
    if config.memory.limit is not None:
        budget = min(budget, config.memory.limit)
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
    found = [(m, k) for m, k in every if method in ("auto", m) and (blocks == "auto" or k == int(blocks))]
    if not found:
        raise PassRefused(f"{method} does not go with k = {blocks} of {layers} layers")
    return found


def _predicted(header: ClassifierHeader, data: Dataset, k: int) -> dict[str, int]:
    network = header.network
    return {
        "runtime": RUNTIME,
        "networks": 4 * network.size,  # the candidate, the best so far, the replay and the staged one
        "step": memory.step_bytes(network, BATCH, k, int8=True),
        "examples": len(data.members) * (2 * math.prod(network.input) + _EXAMPLE),
    }


class ClassifierPass(Attempt):
    """A classifier's pass, which learns inside the engine. It has no neutral inputs to drift on: its one task is all it
    knows."""

    nll_weight = 0.0  # the loss is the cross-entropy alone

    def __init__(self, means: Means, setting: ClassifierSetting) -> None:
        super().__init__(means)
        self._setting = setting
        self._zo_steps = 0
        self._network, self._ledger = means.folder / NETWORK, means.folder / LEDGER

    async def _learn(self, data: Dataset) -> None:
        setting = self._setting
        what = f"backpropagation in {setting.blocks} of {setting.layers} layers"
        self._progress.begin("zo" if setting.has_zo else "train", setting.steps, what)
        try:
            done: dict[str, Any] = await self._engine.call(
                "learn",
                on_progress=self._on_step,
                train=[member.number for member in data.of("train")],
                dev=[member.number for member in data.of("dev")],
                parent=self._parent,
                bp_layers=setting.blocks,
                frozen=setting.frozen,
                steps=setting.steps,
                batch=BATCH,
                seed=self._seed + self._progress.id,
                noise=NOISE,
                zo_bits=ZO_BITS,
                bp_bits=BP_BITS,
                network=str(self._network),
                ledger=str(self._ledger),
            )
        finally:
            await self._flush_steps()
        self._zo_steps = done["zo_steps"]
        self._progress.message = f"best of {done['steps']} steps: step {done['best_step']}"

    async def _stage_candidate(self) -> None:
        await self._engine.stage(CANDIDATE, self._network, None)

    async def _drift(self) -> None:
        return None

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        files = {NETWORK: self._network}
        if self._zo_steps:
            files[LEDGER] = self._ledger
        made = {"method": self._setting.method, "blocks": self._setting.blocks, "zo_steps": self._zo_steps}
        return files, made

    def _on_step(self, figures: dict[str, Any]) -> None:
        progress, setting = self._progress, self._setting
        progress.step, progress.loss = figures["step"], figures["loss"]
        row: dict[str, Any] = {"phase": "zo" if setting.has_zo else "bp", "step": figures["step"]}
        row |= {"loss": figures["loss"], "seconds": progress.seconds}
        if "dev_loss" in figures:
            progress.dev_loss, progress.accuracy = figures["dev_loss"], figures["dev_accuracy"]
            row |= {"dev_loss": figures["dev_loss"], "dev_accuracy": figures["dev_accuracy"]}
        elif figures["step"] % max(1, setting.steps // _KEPT_STEPS):
            return
        if setting.has_zo:
            row |= {"seed": str(figures["seed"]), "projected_gradient": float(figures["sign"])}
        self._rows.append(row)


class ClassifierTrial(Trial):
    """The canary is an input of zeros: it must be answered, with probabilities that are numbers."""

    canary = "an input of zeros"

    async def _ask(self, prompt: str) -> None:
        info = self._engine.info
        assert info is not None
        assert info.input_shape is not None
        answer = await self._engine.classify(zeros(tuple(info.input_shape)))
        if not math.isclose(math.fsum(answer.probabilities), 1.0, abs_tol=1e-6):
            raise ArithmeticError("got probabilities that do not add up to one")


def zeros(shape: tuple[int, ...]) -> dict[str, Any]:
    """An input of zeros as it would be stored."""
    data = base64.b64encode(bytes(math.prod(shape))).decode()
    return {"array": {"dtype": "uint8", "shape": list(shape), "data": data}}
