"""The admin API: what happened, what is happening, and steps back. Served on the admin socket only."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd import __version__
from agentd.api.requests import number, only, parse
from agentd.api.schemas import AdaptBody, Body, RollbackBody
from agentd.api.services import Services, services
from agentd.budget import probe
from agentd.errors import InvalidRequest, NotFound
from agentd.store import events, examples, feedback, inferences, passes, revisions, tasks


def _page(request: Request, *also: str) -> dict[str, int]:
    only(request, "limit", "offset", *also)
    return {"limit": number(request, "limit", 50, 1, 1000), "offset": number(request, "offset", 0, 0, 1 << 62)}


async def status(request: Request) -> Response:
    s = services(request)
    only(request)
    counts = await s.store.call(examples.count)
    info = s.supervisor.info
    return JSONResponse(
        {
            "version": __version__,
            "pid": s.adaptation.daemon_pid,
            "uptime_seconds": round(time.monotonic() - s.started, 1),
            "model": {
                **(info.as_json() if info else {}),
                "name": s.model_name,
                "path": str(s.model.path),
                "sha256": s.model.sha256,
            },
            "state": "serving" if s.supervisor.ready else "loading",
            "problem": s.supervisor.problem,
            "revision": s.supervisor.revision,
            "trial": await s.adaptation.trial_json(),
            "pass": s.adaptation.progress_json(running_only=True),
            "requests": {"served": s.activity.served, "failed": s.activity.failed, **await _load(s)},
            "engine_restarts": s.supervisor.restarts,
            "feedback": {"total": await s.store.call(feedback.count)},
            "examples": counts,
            "memory": {
                "available_bytes": probe.read().available,
                "reserve_bytes": s.config.memory.reserve,
                "processes": s.adaptation.processes(),
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


async def _load(s: Services) -> dict[str, int]:
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
    row = await s.store.call(revisions.get, request.path_params["revision"])
    lineage = await s.store.call(revisions.lineage, row.id)
    return JSONResponse({**_revision(s, row), "manifest": s.adaptation.files.manifest(row.id), "lineage": lineage})


def _revision(s: Services, row: Any) -> dict[str, Any]:
    return {**row.as_json(), "serving": row.id == s.supervisor.revision, "size_bytes": s.adaptation.files.size(row.id)}


async def list_passes(request: Request) -> Response:
    rows = await services(request).store.call(passes.latest, **_page(request))
    return JSONResponse({"passes": [row.as_json() for row in rows]})


async def show_pass(request: Request) -> Response:
    s, number_ = services(request), request.path_params["pass_id"]
    row = await s.store.call(passes.get, number_)
    happened = await s.store.call(events.latest, 1000, pass_id=number_)
    steps = await s.store.call(passes.steps, number_)
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
    page = _page(request, "kind", "task")
    rows = await s.store.call(feedback.list_, **page, kind=query.get("kind"), task=query.get("task"))
    return JSONResponse({"feedback": [row.as_json() for row in rows], "total": await s.store.call(feedback.count)})


async def list_examples(request: Request) -> Response:
    s, query = services(request), request.query_params
    page = _page(request, "task", "split", "state")
    if query.get("split") not in (None, "train", "holdout"):
        raise InvalidRequest("split is train or holdout", param="split")
    rows = await s.store.call(
        examples.list_, **page, task=query.get("task"), split=query.get("split"), state=query.get("state")
    )
    return JSONResponse({"examples": [row.as_json() for row in rows], "counts": await s.store.call(examples.count)})


async def list_tasks(request: Request) -> Response:
    only(request)
    rows = await services(request).store.call(tasks.all)
    return JSONResponse({"tasks": [row.as_json() for row in rows]})


async def list_inferences(request: Request) -> Response:
    rows = await services(request).store.call(inferences.latest, **_page(request))
    return JSONResponse({"inferences": [row.as_json() for row in rows]})


async def show_inference(request: Request) -> Response:
    row = await services(request).store.call(inferences.get, request.path_params["inference"])
    return JSONResponse(row.as_json())


async def list_events(request: Request) -> Response:
    only(request, "after", "limit")
    after = number(request, "after", 0, 0, 1 << 62)
    rows = await services(request).store.call(events.latest, number(request, "limit", 100, 1, 1000), after_id=after)
    return JSONResponse({"events": [row.as_json() for row in rows]})


async def unknown(request: Request) -> Response:
    raise NotFound("resource", request.url.path)
