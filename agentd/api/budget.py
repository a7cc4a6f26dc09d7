"""GET /admin/budget: the memory there is, and what every plan would take of it."""

import asyncio
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.adapt import dataset as datasets
from agentd.adapt.planning import runtime
from agentd.api.requests import only
from agentd.api.services import Services, services
from agentd.budget import history, planner, probe
from agentd.budget.architecture import Architecture
from agentd.budget.in_place import architecture as shapes
from agentd.budget.planner import Choice, budget_of, consider, refusal
from agentd.budget.workload import Workload
from agentd.checkpoint_header import CheckpointHeader
from agentd.errors import InvalidRequest, NotALanguageModel, PassRefused
from agentd.processor import multiplies_bf16
from agentd.safetensors_header import ClassifierHeader
from agentd.store import passes

_PASSES = 50  # earlier ones that are looked at
_NOMINAL = [f"{'task ' * 14}{number} {'text ' * 20}" for number in range(512)]  # stand in while there are no examples


async def budget(request: Request) -> Response:
    """Query: `method` and `blocks` look at that setting alone. Nothing is refused here: plans say what they miss."""
    s, query = services(request), request.query_params
    only(request, "method", "blocks")
    if isinstance(s.model.header, ClassifierHeader):
        raise NotALanguageModel(s.model_name, "`agentctl adapt --dry-run` shows what a pass of it would take")
    blocks: int | str = query.get("blocks", "auto")
    if blocks != "auto":
        if not str(blocks).isdigit():
            raise InvalidRequest(f"blocks must be a number or auto, not {blocks!r}", param="blocks")
        blocks = int(blocks)
    workload, note = await _workload(s)
    rows = [row.as_json() for row in await s.store.call(passes.latest, _PASSES)]
    reading = await asyncio.to_thread(lambda: probe.read(sensors=probe.read_sensors))
    in_place = s.config.engine == "transformers"
    if in_place or isinstance(s.model.header, CheckpointHeader):
        architecture = shapes(s.model.header, s.config.model.dtype)
    else:
        architecture = Architecture.from_header(s.model.header)
    memory = s.config.memory
    factors, outcomes = history.calibration(rows), history.outcomes(rows)
    # The trainer is asked what it can do when the first pass is planned; until then it is taken to know the model.
    probed = s.adaptation.probed or {"supported": True, "bf16": multiplies_bf16()}
    free = budget_of(reading.available, memory.reserve, memory.limit)
    considered = consider(
        architecture,
        workload,
        budget=free,
        method=query.get("method", "auto"),
        blocks=blocks,
        bp=bool(probed["supported"]),
        no_bp_reason=str(probed.get("reason")),
        bf16=bool(probed.get("bf16")),
        runtime=runtime(probed),
        calibration=factors,
        history=outcomes,
        in_place=in_place,
    )
    return JSONResponse(
        {
            "reading": reading.as_json(),
            "available_bytes": reading.available,
            "reserve_bytes": memory.reserve,
            "limit_bytes": memory.limit,
            "budget_bytes": free,
            "model": {**_shapes(architecture), "name": s.model_name, "context": s.config.model.context},
            "workload": {**workload.as_json(), "note": note},
            "calibration": [factor.as_json() for factor in factors.values()],
            "passes": len(outcomes),
            "plans": [each.as_json(terms=True) for each in considered],
            **_verdict(s, considered, free, reading.available),
        }
    )


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
    sizes: dict[str, Any] = {"rank": adapt.rank, "context": s.config.model.context}
    try:
        data = await s.store.call(
            lambda db: datasets.select(db, limit=adapt.max_examples, seed=adapt.seed, gate=adapt.gate)
        )
    except PassRefused as refused:
        note = f"{refused}; until then {len(_NOMINAL)} examples of {len(_NOMINAL[0])} characters are assumed"
        return Workload.estimated(_NOMINAL, **sizes), note
    inputs = [json.dumps(member.example.input, ensure_ascii=False) for member in data.members]
    return Workload.estimated(inputs, [member.example.target for member in data.members], **sizes), None


def _shapes(arch: Architecture) -> dict[str, Any]:
    names = ["n_layer", "n_embd", "n_head", "n_head_kv", "head_dim", "n_ff", "n_vocab", "tied", "weight_bytes"]
    return {"architecture": arch.name, **{name: getattr(arch, name) for name in names}}
