"""GET /admin/budget: the memory there is, and what every plan would take of it."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.adapt.planning import dataset as datasets
from agentd.adapt.planning.prepare import earlier_passes
from agentd.adapt.planning.setting import Machine, estimate
from agentd.api.services import Services, services
from agentd.budget import planner
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.planner import Choice, budget_of, refusal
from agentd.budget.workload import Workload
from agentd.errors import PassRefused
from agentd.host import memory as probe
from agentd.host.cpu import multiplies_bf16
from agentd.host.sensors import SensorReader

_NOMINAL = [f"{'task ' * 14}{number} {'text ' * 20}" for number in range(512)]  # stand in while there are no examples


async def budget(request: Request) -> Response:
    """Query: `method` and `blocks` look at that setting alone. Nothing is refused here: plans say what they miss."""
    s, query = services(request), request.query_params
    architecture = s.adaptation.kind.shapes(s.config)
    blocks: int | str = query.get("blocks", "auto")
    if blocks != "auto":
        blocks = int(blocks)
    workload, note = await _workload(s)
    reading = await asyncio.to_thread(lambda: probe.read(sensors=SensorReader().read))
    memory = s.config.memory
    # The trainer is asked what it can do when the first pass is planned; until then it is taken to know the model.
    found = await s.adaptation.known()
    probed = found or {"supported": True, "bf16": multiplies_bf16()}
    machine = Machine(probed, await earlier_passes(s.store))
    known = machine.as_arguments()
    free = budget_of(reading.available, memory.reserve, memory.limit)
    options = {"method": query.get("method", "auto"), "blocks": blocks}
    considered = s.adaptation.kind.considered(s.config, workload, options, machine, free)
    return JSONResponse(
        {
            "reading": reading.as_json(),
            "available_bytes": reading.available,
            "reserve_bytes": memory.reserve,
            "limit_bytes": memory.limit,
            "budget_bytes": free,
            "model": {**_shapes(architecture), "name": s.model_name, "context": s.config.context},
            "workload": {**workload.as_json(), "note": note},
            "calibration": [factor.as_json() for factor in known["calibration"].values()],
            "passes": len(known["history"]),
            "backpropagation": backpropagation(found),
            "plans": [each.as_json(terms=True) for each in considered],
            **_verdict(s, considered, free, reading.available),
        }
    )


def backpropagation(probed: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the trainer said of this model; None until the first pass is planned.

    most_blocks  last blocks that can be trained; where not all can, `reason` says why
    compared     whether blocks were compared with the engine's
    """
    return probed and {
        "supported": bool(probed["supported"]),
        "most_blocks": probed.get("most_blocks"),
        "compared": probed.get("cosines") is not None,
        "reason": probed.get("reason"),
    }


def _verdict(s: Services, considered: tuple[planner.Considered, ...], free: int, available: int) -> dict[str, Any]:
    """Which plan a pass would take now, or why none."""
    memory = s.config.memory
    for each in considered:
        if each.fits:
            choice = Choice(each.plan, free, available, memory.reserve, considered)
            setting = {"method": each.plan.method, "blocks": each.plan.blocks, "checkpoint": each.plan.checkpoint}
            return {"chosen": setting, "why": choice.why, "shortfall_bytes": 0}
    refused = refusal(considered, available=available, reserve=memory.reserve, limit=memory.limit)
    return {"chosen": None, "why": str(refused), "shortfall_bytes": refused.shortfall}


async def _workload(s: Services) -> tuple[Workload, str | None]:
    """What a pass would work on now, and a note where that is assumed."""
    adapt = s.config.adapt
    try:
        data = await s.store.call(
            lambda db: datasets.select(db, limit=adapt.max_examples, seed=adapt.seed, gate=adapt.gate)
        )
    except PassRefused as refused:
        note = f"{refused}; until then {len(_NOMINAL)} examples of {len(_NOMINAL[0])} characters are assumed"
        return Workload.estimated(_NOMINAL, rank=adapt.rank, context=s.config.context), note
    return estimate(s.config, data), None


def _shapes(arch: ModelShapes) -> dict[str, Any]:
    names = ["n_layer", "n_embd", "n_head", "n_head_kv", "head_dim", "n_ff", "n_vocab", "tied", "weight_bytes"]
    return {"architecture": arch.name, **{name: getattr(arch, name) for name in names}}
