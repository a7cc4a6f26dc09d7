"""The admin API: what happened, what is happening, and steps back. Served on the admin socket only."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields
from typing import Any

from sqlite_utils import Database
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd import __version__
from agentd.adapt.planning.dataset import readiness
from agentd.api.budget import backpropagation
from agentd.api.lenient import Body
from agentd.api.requests import identifier, number, parse
from agentd.api.schemas import AdaptBody, MeaningBody, RecallBody, RollbackBody, TaskBody
from agentd.api.services import Services, services
from agentd.api.streaming import EventStream, event
from agentd.engine.protocol import ModelInfo
from agentd.errors import RevisionCorrupt
from agentd.host import memory
from agentd.store import events, examples, feedback, inferences, meanings, passes, revisions, scores, tasks
from agentd.store.passes import Pass

_LOOK = 1.0  # seconds between looks for new events
_SIGN = 15.0  # seconds after which a quiet stream of events gives a sign of life
_DAYS = 100  # of a task's scores, each of one revision
FEEDBACK_FILTERS = ("kind", "task", "state", "author")


def _page(request: Request) -> dict[str, int]:
    return {"limit": number(request, "limit", 50), "offset": number(request, "offset", 0)}


async def status(request: Request) -> Response:
    s = services(request)
    counts = await s.store.call(examples.count)
    ready = await s.store.call(readiness, s.config.adapt.gate)
    apart = await s.store.call(feedback.count, {"state": "quarantined"})
    return JSONResponse(
        {
            "version": __version__,
            "pid": s.adaptation.daemon_pid,
            "uptime_seconds": round(time.monotonic() - s.started, 1),
            "model": _model(s),
            "state": _state(s),
            "problem": s.supervisor.problem
            or s.supervisor.stalled
            or s.supervisor.degraded
            or s.damage
            or s.store.problem,
            "held": s.holds.reasons,
            "revision": s.supervisor.revision,
            "trial": await s.adaptation.trial_json(),
            "last_pass": _ended(await s.store.call(passes.latest, 2)),
            "backpropagation": backpropagation(await s.adaptation.known()),
            "pass": s.adaptation.progress_json(running_only=True),
            "requests": {"served": s.activity.served, "failed": s.activity.failed, **_load(s)},
            "engine_restarts": s.supervisor.restarts,
            "feedback": {"total": await s.store.call(feedback.count), "quarantined": apart},
            "examples": counts,
            "unusable_examples": await s.store.call(examples.excluded),
            "stale_examples": await s.store.call(examples.excluded, "stale"),
            "memory": {
                "available_bytes": memory.read().available,
                "reserve_bytes": s.config.memory.reserve,
                "processes": await asyncio.to_thread(s.adaptation.processes),
            },
            "next_trigger": {
                "new_examples": ready.new,
                "waiting": ready.waiting,
                "missing": ready.missing(s.config.adapt.trigger.min_examples),
                "min_examples": s.config.adapt.trigger.min_examples,
                "enabled": s.config.adapt.enabled,
                "paused": s.adaptation.paused,
                "waits_for": s.adaptation.triggers.waits_for,
            },
            "state_dir": str(s.config.state.dir),
            "socket": str(s.config.api_socket),
            "tcp": [{**each, "open": not each["needs_key"] or s.keys.exist.is_set()} for each in s.tcp],
            "keys": len(s.keys),
        }
    )


def _ended(latest: Sequence[Pass]) -> dict[str, Any] | None:
    """How the last pass that is over ended."""
    over = [row for row in latest if row.finished_at is not None]
    return {"id": over[0].id, "state": over[0].state, "reason": over[0].reason} if over else None


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
    s = services(request)
    rows = await s.store.call(revisions.history, number(request, "limit", 50))
    return JSONResponse({"activations": [row.as_json() for row in rows], "scores": await _scores(s)})


async def _scores(s: Services) -> dict[str, list[dict[str, Any]]]:
    """By task, how many answers were right, by day and revision."""
    by_task = await s.store.call(scores.series, _DAYS)
    return {name: [day.as_json() for day in days] for name, days in by_task.items()}


async def list_revisions(request: Request) -> Response:
    s = services(request)
    rows = await s.store.call(revisions.all)
    before = await s.store.call(lambda db: [revisions.predecessor(db, row.id) for row in rows])
    both = zip(rows, before, strict=True)
    return JSONResponse({"revisions": [{**_revision(s, row), "predecessor": id} for row, id in both]})


async def show_revision(request: Request) -> Response:
    s = services(request)
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
    brief = request.query_params.get("brief") == "true"
    return JSONResponse({"passes": [_brief(row.as_json()) if brief else row.as_json() for row in rows]})


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """A pass without what takes most of the room: plans that were considered, terms, single answers."""
    gate = row["gate"]
    tasks = {
        name: {key: value for key, value in facts.items() if key != "answers"}
        for name, facts in gate.get("tasks", {}).items()
    }
    return {name: value for name, value in row.items() if name not in ("plan", "predicted")} | {
        "gate": {**gate, "tasks": tasks} if gate else gate
    }


async def show_pass(request: Request) -> Response:
    s = services(request)
    row = await s.store.call(passes.get, identifier(request, "pass"))
    happened = await s.store.call(events.latest, 1000, pass_id=row.id)
    steps = await s.store.call(passes.steps, row.id)
    return JSONResponse({"pass": row.as_json(), "steps": steps, "events": [event.as_json() for event in happened]})


async def progress(request: Request) -> Response:
    return JSONResponse({"pass": services(request).adaptation.progress_json()})


async def adapt(request: Request) -> Response:
    s = services(request)
    body = await parse(request, AdaptBody, s.config.serve.max_body)
    options = body.model_dump(exclude_defaults=True, exclude={"dry_run"})
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
    s, paused = services(request), request.url.path.endswith("/pause")
    if paused != s.adaptation.paused:
        s.adaptation.paused = paused  # at once; what keeps it over a restart may fail on a full disk
        message = "no pass starts by itself" if paused else "passes start by themselves again"
        await s.store.call(events.add, events.PAUSED if paused else events.RESUMED, message)
    return JSONResponse({"paused": paused})


async def list_feedback(request: Request) -> Response:
    s, query = services(request), request.query_params
    page = _page(request)
    chosen = {name: query.get(name) for name in FEEDBACK_FILTERS}
    rows = await s.store.call(feedback.list_, **page, only=chosen)
    total = await s.store.call(feedback.count, chosen)
    return JSONResponse({"feedback": [row.as_json() for row in rows], "total": total})


async def list_examples(request: Request) -> Response:
    s, query = services(request), request.query_params
    page = _page(request)
    rows = await s.store.call(
        examples.list_, **page, task=query.get("task"), split=query.get("split"), state=query.get("state")
    )
    return JSONResponse({"examples": [row.as_json() for row in rows], "counts": await s.store.call(examples.count)})


async def list_tasks(request: Request) -> Response:
    s = services(request)
    rows, counts = await s.store.call(tasks.all), await s.store.call(examples.count)
    none, scored = {"train": {"new": 0, "used": 0}, "holdout": 0}, await _scores(s)
    about = [
        {
            **row.as_json(),
            "examples": counts.get(row.name, none),
            "scores": scored.get(row.name, []),
            "recall": s.recall.as_json(row.name),
        }
        for row in rows
    ]
    return JSONResponse({"tasks": about})


async def set_recall(request: Request) -> Response:
    s, name = services(request), request.path_params["task"]
    body = await parse(request, RecallBody, s.config.serve.max_body)
    return JSONResponse({"task": name, "recall": await s.recall.set(name, body.recall)})


async def edit_task(request: Request) -> Response:
    s, name = services(request), request.path_params["task"]
    body = await parse(request, TaskBody, s.config.serve.max_body)

    def edit(db: Database) -> dict[str, Any]:
        task, counts = tasks.edit(db, name, body.merge, body.remove)
        events.add(db, "task edited", f"task {name}: {len(body.merge)} choices merged, {len(body.remove)} removed")
        return {"task": task.as_json(), **counts}

    return JSONResponse(await s.store.call(edit))


async def set_meaning(request: Request) -> Response:
    s, name = services(request), request.path_params["task"]
    body = await parse(request, MeaningBody, s.config.serve.max_body)

    def set_(db: Database) -> dict[str, Any]:
        task = tasks.get(db, name)
        if body.since is None:
            task, n = meanings.take_back(db, task)
            return {"task": task.as_json(), "readmitted": n}
        task, n = meanings.change(db, task, body.labels or task.choices, body.since.isoformat())
        return {"task": task.as_json(), "set_aside": n}

    return JSONResponse(await s.store.call(set_))


async def list_inferences(request: Request) -> Response:
    query = request.query_params
    rows = await services(request).store.call(
        inferences.latest,
        **_page(request),
        episode=query.get("episode"),
        task=query.get("task"),
        unjudged=query.get("judged") == "false",
    )
    return JSONResponse({"inferences": [row.as_json() for row in rows]})


async def show_inference(request: Request) -> Response:
    row = await services(request).store.call(inferences.get, request.path_params["inference"])
    return JSONResponse(row.as_json())


async def list_events(request: Request) -> Response:
    """A list; or, for who accepts text/event-stream, events as they happen."""
    after = number(request, "after", 0) if "after" in request.query_params else None
    if "text/event-stream" in request.headers.get("accept", ""):
        seen = request.headers.get("last-event-id", "")  # a browser that connects again says where it was
        known = seen.isascii() and seen.isdigit() and len(seen) < 19
        return EventStream(_live(services(request), int(seen) if known else after))
    rows = await services(request).store.call(events.latest, number(request, "limit", 100), after_id=after)
    return JSONResponse({"events": [row.as_json() for row in rows]})


async def _live(s: Services, after: int | None) -> AsyncGenerator[bytes, None]:
    """What happens after the event `after`, or from now on, as it happens."""
    if after is None:
        newest = await s.store.call(events.latest, 1)
        after = newest[-1].id if newest else 0
    yield b": agentd\n\n"
    quiet = 0.0
    while not s.stopping:
        rows = await s.store.call(events.latest, 100, after_id=after)
        for row in rows:
            after = row.id
            yield f"id: {row.id}\n".encode() + event(row.as_json())
        quiet = 0.0 if rows else quiet + _LOOK
        if quiet >= _SIGN:
            quiet = 0.0
            yield b": still here\n\n"
        await asyncio.sleep(_LOOK)
