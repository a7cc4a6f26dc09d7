"""What the server is: models, health, metrics. None of these wakes or waits for the engine."""

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from agentd import __version__
from agentd.api.requests import only
from agentd.api.services import Services, services
from agentd.errors import UnknownModel
from agentd.store import revisions


async def models(request: Request) -> Response:
    only(request)
    return JSONResponse({"object": "list", "data": [await _model(services(request))]})


async def model(request: Request) -> Response:
    s = services(request)
    only(request)
    if request.path_params["model"] != s.model_name:
        raise UnknownModel(request.path_params["model"], s.model_name)
    return JSONResponse(await _model(s))


async def _model(s: Services) -> dict[str, object]:
    serving = s.supervisor.revision
    row = await s.store.call(revisions.get, serving)
    return {
        "id": s.model_name,
        "object": "model",
        "created": s.model_created,
        "owned_by": "agentd",
        "agentd": {"revision": serving, "parent": row.parent, "base_sha256": s.model.sha256},
    }


async def health(request: Request) -> Response:
    s = services(request)
    body = {
        "status": "ok" if s.supervisor.ready else "loading",
        "revision": s.supervisor.revision,
        "model": s.model_name,
    }
    return JSONResponse(body, 200 if s.supervisor.ready else 503)


async def metrics(request: Request) -> Response:
    """Prometheus text format; base units."""
    s = services(request)
    serving = s.supervisor.revision
    row = await s.store.call(revisions.get, serving)
    outcomes = await s.store.call(s.adaptation.outcomes)
    lines = [
        "# TYPE agentd_build_info gauge",
        f'agentd_build_info{{version="{__version__}"}} 1',
        "# TYPE agentd_uptime_seconds gauge",
        f"agentd_uptime_seconds {time.monotonic() - s.started:.1f}",
        "# TYPE agentd_revision_info gauge",
        f'agentd_revision_info{{revision="{serving}",parent="{row.parent or 0}",base_sha256="{s.model.sha256}"}} 1',
        "# TYPE agentd_requests_total counter",
        f'agentd_requests_total{{outcome="served"}} {s.activity.served}',
        f'agentd_requests_total{{outcome="failed"}} {s.activity.failed}',
        "# TYPE agentd_requests_processing gauge",
        f"agentd_requests_processing {s.activity.active}",
        "# TYPE agentd_engine_restarts_total counter",
        f"agentd_engine_restarts_total {s.supervisor.restarts}",
        "# TYPE agentd_adaptation_passes_total counter",
        *(f'agentd_adaptation_passes_total{{outcome="{name}"}} {n}' for name, n in sorted(outcomes.items())),
    ]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
