"""`agentd fit MODEL`: whether a model file serves and learns on this machine, in what memory and time. Nothing is kept.

The engine and the trainer are started for it: the engine taps some tokens, the trainer compares its own blocks with
them, and both are timed. What a pass of 400 examples takes follows from the same terms that a real pass is planned by.
"""

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.adapt import kinds
from agentd.adapt.kinds.kind import LanguageKind, Probing
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.setting import Machine
from agentd.budget import footprint, planner
from agentd.budget.expectation import Speed
from agentd.budget.planner import Considered
from agentd.budget.workload import Workload
from agentd.config.schema import Config
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import EngineUnavailable, NotALanguageModel
from agentd.host import memory
from agentd.models import ModelFile

EXAMPLES = 400
_TEXT = 90  # characters of an example of the pass that is planned: a sentence
_METHODS = {"mezo": "MeZO", "suffix-bp": "suffix BP", "elasticzo": "ElasticZO", "blockwise-bp": "block-wise BP"}


@dataclass(frozen=True)
class Fit:
    """`most_blocks` are the last blocks that backpropagation can train; `reason` says why not all, if not all can.
    `speed` was measured where `measured` names it (tokens per second); the rest is what is assumed."""

    model: dict[str, Any]
    serving: list[footprint.Term]
    most_blocks: int
    compared: bool
    reason: str | None
    speed: Speed
    measured: tuple[str, ...]
    available: int
    reserve: int
    plans: tuple[Considered, ...]

    def as_json(self) -> dict[str, Any]:
        blocks = self.model["blocks"]
        return {
            "model": self.model,
            "serves": True,
            "trains": {
                "blockwise": self.most_blocks == blocks,
                "suffix_blocks": self.most_blocks,
                "zeroth_order": True,
                "compared": self.compared,
                "reason": self.reason,
            },
            "serving_bytes": footprint.total(self.serving),
            "serving": [term.as_json() for term in self.serving],
            "available_bytes": self.available,
            "reserve_bytes": self.reserve,
            "tokens_per_second": {name: round(getattr(self.speed, name), 1) for name in self.measured},
            "examples": EXAMPLES,
            "plans": [plan.as_json() for plan in self.plans],
        }

    def as_text(self) -> str:
        trains = self.as_json()["trains"]
        lines = [
            f"{self.model['name']}: {self.model['architecture']}, {self.model['blocks']} blocks, "
            f"{_size(self.model['bytes'])} in the file, context {self.model['context']}",
            f"serves       {_size(footprint.total(self.serving))} with one context in use",
            f"trains       block-wise BP (k = L): {_yes(trains['blockwise'])}; suffix BP: "
            f"{f'up to k = {self.most_blocks}' if self.most_blocks else 'no'}; zeroth order: yes",
        ]
        if self.reason:
            lines.append(f"             {self.reason}")
        if not self.compared and self.most_blocks:
            lines.append("             its blocks were not compared with the engine's")
        rates = ", ".join(f"{name} {getattr(self.speed, name):.0f}" for name in self.measured)
        lines += [
            f"tokens/s     {rates or 'not measured'}",
            f"memory       {_size(self.available)} available beside the engine, {_size(self.reserve)} kept free",
            "",
            f"{'a pass on ' + str(EXAMPLES) + ' examples':34} {'takes besides serving':>22} {'fits':>6} {'time':>9}",
        ]
        for each in self.plans:
            name = f"{_METHODS.get(each.plan.method, each.plan.method)}, k = {each.plan.blocks}"
            needed, fits = _size(each.plan.needed), _yes(each.fits)
            lines.append(f"{name:34} {needed:>22} {fits:>6} {_duration(each.expected.seconds):>9}")
        return "\n".join(lines)


async def fit(config: Config, model: ModelFile) -> Fit:
    """Starts an engine and a trainer on `model`, and ends them. Raises EngineUnavailable, NotALanguageModel."""
    kind = kinds.choose(config, model)
    if not isinstance(kind, LanguageKind) or kind.in_place:
        raise NotALanguageModel(model.name, "`agentd fit` is for engine llamacpp")
    before = await asyncio.to_thread(memory.read)
    with tempfile.TemporaryDirectory(prefix="agentd-fit-") as scratch:
        folder = Path(scratch)
        # the engine is to keep nothing beyond this, prefixes of prompts for one
        config = config.model_copy(update={"state": config.state.model_copy(update={"dir": folder})})
        return await _fit(kind, await asyncio.to_thread(kind.fitted, config), model, before.available, folder)


async def _fit(kind: LanguageKind, config: Config, model: ModelFile, before: int, folder: Path) -> Fit:
    shapes = kind.shapes(config)
    activity = Activity()
    engine = Supervisor(
        kind.settings(config),
        lambda _: (None, None),
        activity,
        revision=0,
        queue_limit=1,
        fallback=_no_fallback,
        model=model,
    )
    await engine.start()
    try:
        trainer = Training(activity, folder / "probe.log")
        probed = await kind.probe(config, Probing(engine, trainer, folder, idle=True))
        pss = await asyncio.to_thread(memory.pss, engine.pid) if engine.pid else None
    finally:
        await engine.stop()
    texts = [f"{'word ' * (_TEXT // 5)}{number}" for number in range(EXAMPLES)]
    workload = Workload.estimated(texts, rank=config.adapt.rank, context=config.context)
    serving = footprint.serving_terms(shapes, kv_tokens=config.context, engine=pss)
    # The engine's weights are there whether it runs or not; beside them a pass has what was free before.
    taken = footprint.total(serving)
    available = max(0, before - taken)
    machine = Machine(probed)
    considered = planner.consider(
        shapes,
        workload,
        budget=planner.budget_of(available, config.memory.reserve, config.memory.limit),
        **machine.as_arguments(),
    )
    names = {"name": model.name, "architecture": shapes.name, "blocks": shapes.n_layer, "bytes": shapes.weight_bytes}
    return Fit(
        {**names, "context": config.context, "embedding": shapes.n_embd, "vocabulary": shapes.n_vocab},
        serving,
        int(probed.get("most_blocks") or 0),
        probed.get("cosines") is not None,
        probed.get("reason"),
        machine.speed,
        tuple(name for name in machine.rates if name != "load"),  # which is no rate of tokens
        available,
        config.memory.reserve,
        _best(considered),
    )


def _best(considered: tuple[Considered, ...]) -> tuple[Considered, ...]:
    """Of each method and number of blocks the smallest plan, in the order of their size."""
    smallest: dict[tuple[str, int], Considered] = {}
    for each in considered:
        key = (each.plan.method, each.plan.blocks)
        if key not in smallest or each.plan.needed < smallest[key].plan.needed:
            smallest[key] = each
    return tuple(sorted(smallest.values(), key=lambda each: each.plan.needed))


async def _no_fallback(error: Exception, _: int) -> int:
    raise EngineUnavailable(str(error))


def _size(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 10e9 else f"{size / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
