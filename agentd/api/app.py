"""The two applications: `api` for clients, `admin` with everything."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route

from agentd.api import admin, backup, budget, classify, completions, feedback, forgetting, meta, moving, openapi
from agentd.api.requests import on_error
from agentd.api.services import Services
from agentd.errors import AgentdError


def _get(path: str, handler: object) -> Route:
    return Route(path, handler, methods=["GET"])  # type: ignore[arg-type]  # a coroutine function


def _post(path: str, handler: object) -> Route:
    return Route(path, handler, methods=["POST"])  # type: ignore[arg-type]


API: list[BaseRoute] = [
    _post("/v1/chat/completions", completions.chat_completions),
    _post("/v1/completions", completions.completions),
    _post("/v1/classify", classify.classify),
    _get("/v1/models", meta.models),
    _get("/v1/models/{model:path}", meta.model),
    _post("/v1/feedback", feedback.add_feedback),
    _post("/v1/examples", feedback.add_examples),
    _get("/openapi.json", openapi.serve),
    _get("/health", meta.health),
    _get("/metrics", meta.metrics),
]

ADMIN: list[BaseRoute] = [
    _get("/admin/status", admin.status),
    _get("/admin/history", admin.history),
    _get("/admin/revisions", admin.list_revisions),
    _get("/admin/revisions/{id}", admin.show_revision),
    _get("/admin/revisions/{id}/replay", moving.replay),
    _get("/admin/revisions/{id}/export", moving.export),
    _post("/admin/import", moving.take_in),
    _get("/admin/passes", admin.list_passes),
    _get("/admin/passes/{id}", admin.show_pass),
    _get("/admin/progress", admin.progress),
    _post("/admin/adapt", admin.adapt),
    _post("/admin/cancel", admin.cancel),
    _post("/admin/rollback", admin.rollback),
    _post("/admin/pause", admin.pause),
    _post("/admin/resume", admin.pause),
    _post("/admin/forget", forgetting.forget),
    _post("/admin/rebuild", forgetting.rebuild),
    _post("/admin/release", forgetting.release),
    _get("/admin/feedback", admin.list_feedback),
    _get("/admin/examples", admin.list_examples),
    _get("/admin/tasks", admin.list_tasks),
    _get("/admin/inferences", admin.list_inferences),
    _get("/admin/inferences/{inference}", admin.show_inference),
    _get("/admin/backup", backup.download),
    _get("/admin/events", admin.list_events),
    _get("/admin/budget", budget.budget),
]


def application(services: Services, *, with_admin: bool) -> Starlette:
    handlers = dict.fromkeys((AgentdError, HTTPException, ClientDisconnect, Exception), on_error)
    app = Starlette(routes=API + (ADMIN if with_admin else []), exception_handlers=handlers)
    app.state.services = services
    app.router.redirect_slashes = False  # /v1/feedback/ is an unknown path, not a detour
    return app
