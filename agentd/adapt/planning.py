"""From the configuration, the request and the memory there is now to what a pass will do."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentd.adapt.dataset import Dataset
from agentd.budget import history, planner, probe
from agentd.budget.architecture import Architecture
from agentd.budget.expectation import ZO_STEPS, in_place_steps
from agentd.budget.in_place import architecture as shapes
from agentd.budget.planner import Choice
from agentd.budget.recipe import recipe
from agentd.budget.workload import Workload
from agentd.checkpoint_header import CheckpointHeader
from agentd.config import Config
from agentd.engine.encode import shared_prefix
from agentd.engine.protocol import Encoded
from agentd.models import ModelFile
from agentd.safetensors_header import ClassifierHeader

_ALPHA = 2.0  # LoRA alpha in units of the rank
_PATIENCE = 4  # evaluations, of which an epoch has two


@dataclass(frozen=True)
class Setting:
    """What a pass will do. `blocks` is k; `zo_steps` zeroth-order steps follow on the control vectors. `steps` are all
    those of a pass on the weights themselves."""

    method: str
    blocks: int
    zo_steps: int
    rank: int
    choice: Choice
    steps: int = 0

    @property
    def needed(self) -> int:
        """Bytes beyond serving, all processes together."""
        return self.choice.plan.needed

    @property
    def predicted(self) -> dict[str, int]:
        """Bytes by term."""
        return self.choice.plan.predicted

    @property
    def chooses(self) -> bool:
        """Whether training chooses among several states of the adapter by its loss on dev. After a single epoch there
        is one to choose from, and dev is learned from like the rest."""
        return recipe(self.method, self.blocks).epochs > 1

    def train_options(self, seed: int, threads: int, nll_weight: float) -> dict[str, Any]:
        """Hyperparameters of the trainer; the rest are its defaults."""
        how = recipe(self.method, self.blocks)
        return {
            "rank": self.rank,
            "alpha": _ALPHA * self.rank,
            "lr": how.lr,
            "batch": how.batch,
            "max_epochs": how.epochs,
            "patience": _PATIENCE,
            "seed": seed,
            "threads": threads,
            "nll_weight": nll_weight,
            "micro_tokens": self.choice.plan.micro_tokens,
            "checkpoint": self.choice.plan.checkpoint,
            "bf16": self.choice.plan.bf16,
        }

    def as_json(self) -> dict[str, Any]:
        return {**self.choice.as_json(), "zo_steps": self.zo_steps, "rank": self.rank}


def workload_of(trees: Sequence[Mapping[str, Any]], context: int) -> Workload:
    """What a pass works on, from its examples as the engine encoded them: exact where `Workload.estimated` has only
    texts to go by."""
    encoded = [Encoded(**tree) for tree in trees]
    prefix = shared_prefix(encoded)
    lengths = [len(sequence) - prefix for each in encoded for sequence in each.sequences]
    scored = [{(s, p) for part in (*each.choices, each.target) for s, p, _ in part} for each in encoded]
    return Workload(
        seq_len=max(lengths),
        tokens=sum(lengths),
        examples=len(encoded),
        prefix=prefix,
        scored=max(map(len, scored)),
        sequences=max(len(each.sequences) for each in encoded),
        context=context,
    )


def runtime(probed: Mapping[str, Any]) -> dict[str, int]:
    """Fixed costs by process in bytes, as far as they were measured on this machine."""
    keys = {"trainer": "runtime_bytes", "trainer's start": "start_bytes", "engine": "engine_runtime_bytes"}
    return {process: int(probed[key]) for process, key in keys.items() if probed.get(key)}


def plan(
    config: Config,
    model: ModelFile,
    data: Dataset,
    options: dict[str, Any],
    probed: dict[str, Any],
    earlier: Sequence[Mapping[str, Any]] = (),
    held: int = 0,
    ceiling: int | None = None,
) -> Setting:
    """The best setting that fits. Raises PassRefused with the shortfall.

    options  override the configuration
    earlier  the rows of past passes, the newest first
    held     bytes that a running pass has taken already and that a plan therefore need not find free
    ceiling  bytes that the plan may need at the most, besides what the configuration allows
    """
    in_place = config.engine == "transformers"
    if isinstance(model.header, ClassifierHeader):
        raise TypeError("a classifier is planned by adapt/classifier.py")
    if in_place or isinstance(model.header, CheckpointHeader):
        architecture = shapes(model.header, config.model.dtype)
    else:
        architecture = Architecture.from_header(model.header)
    workload = Workload.estimated(
        [json.dumps(member.example.input, ensure_ascii=False) for member in data.members],
        [member.example.target for member in data.members],
        rank=config.adapt.rank,
        context=config.model.context,
    )
    choice = planner.choose(
        architecture,
        workload,
        available=probe.read().available + held,
        reserve=config.memory.reserve,
        limit=min((size for size in (config.memory.limit, ceiling) if size is not None), default=None),
        method=options.get("method", config.adapt.method),
        blocks=options.get("blocks", config.adapt.blocks),
        bp=bool(probed["supported"]),
        no_bp_reason=str(probed.get("reason")),
        bf16=bool(probed.get("bf16")),
        runtime=runtime(probed),
        calibration=history.calibration(earlier),
        history=history.outcomes(earlier),
        in_place=in_place,
    )
    steps = options.get("zo_steps", config.adapt.zo_steps)
    chosen = choice.plan
    if in_place:
        is_bp = chosen.method in ("bp", "lora")
        if steps == "auto" or is_bp:
            steps = in_place_steps(chosen.method, chosen.blocks, len(data.of("train")))
        return Setting(chosen.method, chosen.blocks, 0 if is_bp else int(steps), config.adapt.rank, choice, int(steps))
    if steps == "auto":
        steps = ZO_STEPS[chosen.method]
    return Setting(chosen.method, chosen.blocks, int(steps), config.adapt.rank, choice)
