"""POST /admin/forget, /admin/rebuild and /admin/release: what was said is taken back, or let out of quarantine."""

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.adapt import rebuild as rebuilding
from agentd.api.requests import parse
from agentd.api.schemas import ForgetBody, RebuildBody, ReleaseBody, Selected
from agentd.api.services import services
from agentd.store import events, feedback
from agentd.store.forgetting import Selection


async def forget(request: Request) -> Response:
    s = services(request)
    body = await parse(request, ForgetBody, s.config.serve.max_body)
    weights = s.config.feedback.weights
    selection = replace(_selection(body), keep_inferences=body.keep_inferences)
    forgotten = await rebuilding.forget(s.store, s.adaptation, selection, dry_run=body.dry_run, weights=weights)
    if not body.dry_run:
        await s.supervisor.forget_prefixes()
    await s.recall.load()  # a task may be gone
    return JSONResponse(forgotten)


async def rebuild(request: Request) -> Response:
    s = services(request)
    body = await parse(request, RebuildBody, s.config.serve.max_body)
    options = body.model_dump(exclude_none=True, exclude={"without"})
    selection = None if body.without is None else _selection(body.without)
    weights = s.config.feedback.weights
    answer = await rebuilding.rebuild(s.store, s.adaptation, selection, options, weights)
    if selection is not None:
        await s.supervisor.forget_prefixes()
    await s.recall.load()
    return JSONResponse(answer, 202)


async def release(request: Request) -> Response:
    s = services(request)
    body = await parse(request, ReleaseBody, s.config.serve.max_body)
    rows = await s.store.call(feedback.release, body.feedback, s.config.feedback.weights)
    await s.store.call(events.add, "released", f"{len(rows)} feedback left quarantine")
    return JSONResponse({"released": [row.id for row in rows]})


def _selection(body: Selected) -> Selection:
    return Selection(
        feedback=tuple(body.feedback),
        inferences=tuple(body.inferences),
        examples=tuple(body.examples),
        authors=tuple(body.authors),
        tags=tuple(body.tags.items()),
    )
