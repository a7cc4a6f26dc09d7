"""The admin API: what happened, what is happening, and steps back. Served on the admin socket only."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd import __version__
from agentd.api.requests import identifier, number, only, parse
from agentd.api.schemas import KINDS, AdaptBody, Body, RollbackBody
from agentd.api.services import Services, services
from agentd.budget import probe
from agentd.engine.protocol import ModelInfo
from agentd.errors import InvalidRequest, RevisionCorrupt
from agentd.store import events, examples, feedback, inferences, passes, revisions, tasks

_FEEDBACK_FILTERS = ("kind", "task", "state", "author")


def _page(request: Request, *also: str) -> dict[str, int]:
    only(request, "limit", "offset", *also)
    return {"limit": number(request, "limit", 50, 1, 1000), "offset": number(request, "offset", 0, 0, 1 << 62)}


async def status(request: Request) -> Response:
    s = services(request)
    only(request)
    counts = await s.store.call(examples.count)
    apart = await s.store.call(feedback.count, {"state": "quarantined"})
    return JSONResponse(
        {
            "version": __version__,
            "pid": s.adaptation.daemon_pid,
            "uptime_seconds": round(time.monotonic() - s.started, 1),
            "model": _model(s),
            "state": _state(s),
            "problem": s.supervisor.problem or s.supervisor.degraded or s.damage or None,
            "held": s.holds.reasons,
            "revision": s.supervisor.revision,
            "trial": await s.adaptation.trial_json(),
            "pass": s.adaptation.progress_json(running_only=True),
            "requests": {"served": s.activity.served, "failed": s.activity.failed, **_load(s)},
            "engine_restarts": s.supervisor.restarts,
            "feedback": {"total": await s.store.call(feedback.count), "quarantined": apart},
            "examples": counts,
            "memory": {
                "available_bytes": probe.read().available,
                "reserve_bytes": s.config.memory.reserve,
                "processes": await asyncio.to_thread(s.adaptation.processes),
            },
            "next_trigger": {
                "new_examples": await s.store.call(examples.count_new),
                "min_examples": s.config.adapt.trigger.min_examples,
                "enabled": s.config.adapt.enabled,
                "paused": s.adaptation.paused,
            },
            "state_dir": str(s.config.state.dir),
            "socket": str(s.config.api_socket),
        }
    )


def _state(s: Services) -> str:
    if s.supervisor.ready:
        return "degraded" if s.supervisor.degraded else "serving"
    return "degraded" if s.supervisor.restarts else "loading"


def _model(s: Services) -> dict[str, Any]:
    """Facts of the model; until it is loaded, those that its file's header does not tell are None."""
    known = {
        **dict.fromkeys(field.name for field in fields(ModelInfo)),
        "architecture": s.model.header.architecture,
        "size_bytes": s.model.size,
    }
    if s.supervisor.info:
        known = s.supervisor.info.as_json()
    return {**known, "name": s.model_name, "path": str(s.model.path), "sha256": s.model.sha256}


def _load(s: Services) -> dict[str, int]:
    active = s.activity.active
    return {"active": min(active, s.config.serve.slots), "waiting": max(0, active - s.config.serve.slots)}


async def history(request: Request) -> Response:
    only(request, "limit")
    rows = await services(request).store.call(revisions.history, number(request, "limit", 50, 1, 1000))
    return JSONResponse({"activations": [row.as_json() for row in rows]})


async def list_revisions(request: Request) -> Response:
    s = services(request)
    only(request)
    rows = await s.store.call(revisions.all)
    return JSONResponse({"revisions": [_revision(s, row) for row in rows]})


async def show_revision(request: Request) -> Response:
    s = services(request)
    only(request)
    row = await s.store.call(revisions.get, identifier(request, "revision"))
    lineage = await s.store.call(revisions.lineage, row.id)
    manifest, problem = None, None
    try:
        manifest = s.adaptation.files.manifest(row.id)
    except RevisionCorrupt as error:  # or removed, as those that were never tried out are
        problem = str(error)
    return JSONResponse({**_revision(s, row), "manifest": manifest, "problem": problem, "lineage": lineage})


def _revision(s: Services, row: Any) -> dict[str, Any]:
    return {**row.as_json(), "serving": row.id == s.supervisor.revision, "size_bytes": s.adaptation.files.size(row.id)}


async def list_passes(request: Request) -> Response:
    rows = await services(request).store.call(passes.latest, **_page(request))
    return JSONResponse({"passes": [row.as_json() for row in rows]})


async def show_pass(request: Request) -> Response:
    s = services(request)
    only(request)
    row = await s.store.call(passes.get, identifier(request, "pass"))
    happened = await s.store.call(events.latest, 1000, pass_id=row.id)
    steps = await s.store.call(passes.steps, row.id)
    return JSONResponse({"pass": row.as_json(), "steps": steps, "events": [event.as_json() for event in happened]})


async def progress(request: Request) -> Response:
    only(request)
    return JSONResponse({"pass": services(request).adaptation.progress_json()})


async def adapt(request: Request) -> Response:
    s = services(request)
    body = await parse(request, AdaptBody, s.config.serve.max_body)
    options = body.model_dump(exclude_none=True, exclude={"dry_run"})
    if body.dry_run:
        return JSONResponse({"plan": await s.adaptation.dry_run(options)})
    return JSONResponse({"pass": await s.adaptation.start("manual", options)}, 202)


async def cancel(request: Request) -> Response:
    await parse(request, Body, 1024)
    return JSONResponse({"pass": await services(request).adaptation.cancel()})


async def rollback(request: Request) -> Response:
    s = services(request)
    body = await parse(request, RollbackBody, s.config.serve.max_body)
    return JSONResponse(await s.adaptation.rollback(body.revision, body.reason))


async def pause(request: Request) -> Response:
    await parse(request, Body, 1024)
    services(request).adaptation.paused = request.url.path.endswith("/pause")
    return JSONResponse({"paused": services(request).adaptation.paused})


async def list_feedback(request: Request) -> Response:
    s, query = services(request), request.query_params
    page = _page(request, *_FEEDBACK_FILTERS)
    _one_of(request, "kind", KINDS)
    _one_of(request, "state", feedback.STATES)
    chosen = {name: query.get(name) for name in _FEEDBACK_FILTERS}
    rows = await s.store.call(feedback.list_, **page, only=chosen)
    total = await s.store.call(feedback.count, chosen)
    return JSONResponse({"feedback": [row.as_json() for row in rows], "total": total})


async def list_examples(request: Request) -> Response:
    s, query = services(request), request.query_params
    page = _page(request, "task", "split", "state")
    _one_of(request, "split", ("train", "holdout"))
    _one_of(request, "state", ("new", "used", "stale", "excluded"))
    rows = await s.store.call(
        examples.list_, **page, task=query.get("task"), split=query.get("split"), state=query.get("state")
    )
    return JSONResponse({"examples": [row.as_json() for row in rows], "counts": await s.store.call(examples.count)})


async def list_tasks(request: Request) -> Response:
    s = services(request)
    only(request)
    rows, counts = await s.store.call(tasks.all), await s.store.call(examples.count)
    none = {"train": {"new": 0, "used": 0}, "holdout": 0}
    return JSONResponse({"tasks": [{**row.as_json(), "examples": counts.get(row.name, none)} for row in rows]})


async def list_inferences(request: Request) -> Response:
    rows = await services(request).store.call(inferences.latest, **_page(request))
    return JSONResponse({"inferences": [row.as_json() for row in rows]})


async def show_inference(request: Request) -> Response:
    only(request)
    row = await services(request).store.call(inferences.get, request.path_params["inference"])
    return JSONResponse(row.as_json())


async def list_events(request: Request) -> Response:
    only(request, "after", "limit")
    after = number(request, "after", 0, 0, 1 << 62) if "after" in request.query_params else None
    rows = await services(request).store.call(events.latest, number(request, "limit", 100, 1, 1000), after_id=after)
    return JSONResponse({"events": [row.as_json() for row in rows]})


def _one_of(request: Request, name: str, known: Sequence[str]) -> None:
    """Refuses a filter that would never match anything."""
    value = request.query_params.get(name)
    if value is not None and value not in known:
        raise InvalidRequest(f"{name} is one of {', '.join(known)}, not {value!r}", param=name)
