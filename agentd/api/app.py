"""The applications, one for each door: what may be done there is a matter of scopes."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from agentd.api import (
    admin,
    api_keys,
    backup,
    budget,
    classify,
    completions,
    embeddings,
    examples,
    feedback,
    fleet,
    forgetting,
    lenient,
    meta,
    ollama,
    ollama_body,
    openapi,
    response_body,
    responses,
    schemas,
    speed,
    transfer,
    ui,
)
from agentd.api.access import Door, Scope
from agentd.api.cors import Cors
from agentd.api.requests import on_error
from agentd.api.routes import BOOLEAN, LIMIT, PAGE, TEXT, DeclaredRoute
from agentd.api.services import Services
from agentd.errors import AgentdError
from agentd.store.feedback import STATES as FEEDBACK_STATES

_BLOCKS = {**TEXT, "pattern": "^(auto|[0-9]{1,9})$", "description": "a number or auto"}
_FEEDBACK = {
    **PAGE,
    "kind": {"enum": list(schemas.KINDS)},
    "task": TEXT,
    "state": {"enum": list(FEEDBACK_STATES)},
    "author": TEXT,
}
_EXAMPLES = {
    **PAGE,
    "task": TEXT,
    "split": {"enum": ["train", "holdout"]},
    "state": {"enum": ["new", "used", "stale", "excluded"]},
}
_INFERENCES = {**PAGE, "episode": TEXT, "task": TEXT, "judged": {"enum": ["false"]}}
_LINES = "One JSON object a line; a body of one line is one example."

API: list[BaseRoute] = [
    DeclaredRoute("POST", "/v1/chat/completions", completions.chat_completions, Scope.ASK, schemas.ChatCompletion),
    DeclaredRoute("POST", "/v1/completions", completions.completions, Scope.ASK, schemas.TextCompletion),
    DeclaredRoute("POST", "/v1/responses", responses.responses, Scope.ASK, response_body.ResponsesBody),
    DeclaredRoute("GET", "/v1/responses/{id}", responses.show, Scope.ASK, statuses=(404,)),
    DeclaredRoute("DELETE", "/v1/responses/{id}", responses.delete, Scope.ASK, statuses=(404, 409)),
    DeclaredRoute(
        "GET",
        "/v1/responses/{id}/input_items",
        responses.input_items,
        Scope.ASK,
        query={**LIMIT, "order": {"enum": ["asc", "desc"]}, "after": TEXT},
        statuses=(404,),
    ),
    DeclaredRoute(
        "POST",
        "/v1/responses/{id}/cancel",
        responses.cancel,
        Scope.ASK,
        lenient.Lenient,
        statuses=(400, 404),
        optional=True,
    ),
    DeclaredRoute("POST", "/v1/embeddings", embeddings.embeddings, Scope.ASK, embeddings.EmbeddingsBody),
    DeclaredRoute(
        "POST",
        "/v1/classify",
        classify.classify,
        Scope.ASK,
        schemas.ClassifyBody,
        query=dict.fromkeys(("model", "task", "shape", "dtype"), TEXT),
    ),
    DeclaredRoute("GET", "/v1/models", meta.models, Scope.ASK),
    DeclaredRoute("GET", "/v1/models/{model:path}", meta.model, Scope.ASK, statuses=(404,)),
    DeclaredRoute(
        "POST",
        "/v1/feedback",
        feedback.add_feedback,
        Scope.FEEDBACK,
        schemas.FeedbackBody,
        statuses=(201, 404, 409, 429),
    ),
    DeclaredRoute(
        "POST",
        "/v1/examples",
        examples.add_examples,
        Scope.FEEDBACK,
        schemas.ExampleLine,
        media="application/x-ndjson",
        description=_LINES,
    ),
    DeclaredRoute("POST", "/api/chat", ollama.chat, Scope.ASK, ollama_body.OllamaChat, statuses=(404,)),
    DeclaredRoute("POST", "/api/generate", ollama.generate, Scope.ASK, ollama_body.OllamaGenerate, statuses=(404,)),
    DeclaredRoute("POST", "/api/embed", ollama.embed, Scope.ASK, ollama_body.OllamaEmbed, statuses=(404,)),
    DeclaredRoute("POST", "/api/embeddings", ollama.embeddings, Scope.ASK, ollama_body.OllamaEmbeddings),
    DeclaredRoute("POST", "/api/show", ollama.show, Scope.ASK, ollama_body.OllamaShow, statuses=(404,)),
    DeclaredRoute("GET", "/api/tags", ollama.tags, Scope.ASK),
    DeclaredRoute("GET", "/api/ps", ollama.ps, Scope.ASK),
    DeclaredRoute("GET", "/api/version", ollama.version, Scope.ASK),
    DeclaredRoute("GET", "/", ollama.alive, Scope.NONE, statuses=(307,), lenient=True),
    DeclaredRoute("GET", "/openapi.json", openapi.serve, Scope.ASK),
    DeclaredRoute("GET", "/health", meta.health, Scope.NONE, lenient=True),
    DeclaredRoute("GET", "/metrics", meta.metrics, Scope.ASK, lenient=True),
]

ADMIN: list[BaseRoute] = [
    DeclaredRoute("GET", "/admin/status", admin.status, Scope.ADMIN),
    DeclaredRoute("GET", "/admin/history", admin.history, Scope.ADMIN, query=LIMIT),
    DeclaredRoute("GET", "/admin/revisions", admin.list_revisions, Scope.ADMIN),
    DeclaredRoute("GET", "/admin/revisions/{id}", admin.show_revision, Scope.ADMIN, statuses=(404,)),
    DeclaredRoute(
        "GET",
        "/admin/revisions/{id}/replay",
        transfer.replay,
        Scope.ADMIN,
        query={"verify": BOOLEAN},
        statuses=(404, 409),
    ),
    DeclaredRoute(
        "GET",
        "/admin/revisions/{id}/export",
        transfer.export,
        Scope.ADMIN,
        query={"format": {"enum": list(transfer.FORMATS)}},
        statuses=(404, 409),
    ),
    DeclaredRoute(
        "POST", "/admin/import", transfer.import_revision, Scope.ADMIN, statuses=(202, 409), media="application/x-tar"
    ),
    DeclaredRoute("GET", "/admin/passes", admin.list_passes, Scope.ADMIN, query={**PAGE, "brief": BOOLEAN}),
    DeclaredRoute("GET", "/admin/passes/{id}", admin.show_pass, Scope.ADMIN, statuses=(404,)),
    DeclaredRoute("GET", "/admin/progress", admin.progress, Scope.ADMIN),
    DeclaredRoute("POST", "/admin/adapt", admin.adapt, Scope.ADMIN, schemas.AdaptBody, statuses=(202, 409)),
    DeclaredRoute("POST", "/admin/cancel", admin.cancel, Scope.ADMIN, lenient.Body, statuses=(409,)),
    DeclaredRoute(
        "POST", "/admin/rollback", admin.rollback, Scope.ADMIN, schemas.RollbackBody, statuses=(404, 409), optional=True
    ),
    DeclaredRoute("POST", "/admin/speed", speed.speed, Scope.ADMIN, lenient.Body, statuses=(409,)),
    DeclaredRoute("POST", "/admin/pause", admin.pause, Scope.ADMIN, lenient.Body),
    DeclaredRoute("POST", "/admin/resume", admin.pause, Scope.ADMIN, lenient.Body),
    DeclaredRoute("POST", "/admin/forget", forgetting.forget, Scope.ADMIN, schemas.ForgetBody, statuses=(404,)),
    DeclaredRoute(
        "POST", "/admin/rebuild", forgetting.rebuild, Scope.ADMIN, schemas.RebuildBody, statuses=(202, 404, 409)
    ),
    DeclaredRoute("POST", "/admin/release", forgetting.release, Scope.ADMIN, schemas.ReleaseBody, statuses=(404, 409)),
    DeclaredRoute(
        "GET",
        "/admin/feedback",
        admin.list_feedback,
        Scope.ADMIN,
        query=_FEEDBACK,
    ),
    DeclaredRoute(
        "GET",
        "/admin/examples",
        admin.list_examples,
        Scope.ADMIN,
        query=_EXAMPLES,
    ),
    DeclaredRoute("GET", "/admin/tasks", admin.list_tasks, Scope.ADMIN),
    DeclaredRoute("POST", "/admin/tasks/{task}", admin.edit_task, Scope.ADMIN, schemas.TaskBody, statuses=(404, 409)),
    DeclaredRoute(
        "POST", "/admin/tasks/{task}/meaning", admin.set_meaning, Scope.ADMIN, schemas.MeaningBody, statuses=(404,)
    ),
    DeclaredRoute(
        "POST", "/admin/tasks/{task}/recall", admin.set_recall, Scope.ADMIN, schemas.RecallBody, statuses=(404, 409)
    ),
    DeclaredRoute("GET", "/admin/inferences", admin.list_inferences, Scope.ADMIN, query=_INFERENCES),
    DeclaredRoute("GET", "/admin/inferences/{inference}", admin.show_inference, Scope.ADMIN, statuses=(404,)),
    DeclaredRoute("GET", "/admin/keys", api_keys.list_keys, Scope.ADMIN),
    DeclaredRoute("POST", "/admin/keys", api_keys.add_key, Scope.ADMIN, api_keys.KeyBody, statuses=(201, 409)),
    DeclaredRoute("POST", "/admin/keys/{name}/revoke", api_keys.revoke_key, Scope.ADMIN, lenient.Body, statuses=(404,)),
    DeclaredRoute("POST", "/admin/dashboard", ui.offer, Scope.ADMIN, lenient.Body, statuses=(401,), optional=True),
    DeclaredRoute("GET", "/admin/fleet", fleet.show_fleet, Scope.ADMIN),
    DeclaredRoute(
        "POST", "/admin/fleet/train", fleet.train, Scope.ADMIN, fleet.TrainBody, statuses=(202, 403, 404, 409, 503)
    ),
    DeclaredRoute("POST", "/admin/fleet/take", fleet.take, Scope.ADMIN, fleet.TakeBody, statuses=(202, 403, 409, 503)),
    DeclaredRoute("GET", "/admin/fleet/rounds/{run}/{number}", fleet.show_round, Scope.ADMIN, statuses=(404,)),
    DeclaredRoute("GET", "/admin/fleet/rounds/{run}/{number}/result", fleet.result, Scope.ADMIN, statuses=(403, 404)),
    DeclaredRoute("GET", "/admin/fleet/rounds/{run}/{number}/figures", fleet.figures, Scope.ADMIN, statuses=(404, 409)),
    DeclaredRoute("GET", "/admin/backup", backup.download, Scope.ADMIN),
    DeclaredRoute("GET", "/admin/events", admin.list_events, Scope.ADMIN, query={**LIMIT, "after": PAGE["offset"]}),
    DeclaredRoute(
        "GET",
        "/admin/budget",
        budget.budget,
        Scope.ADMIN,
        query={"method": TEXT, "blocks": _BLOCKS},
    ),
]


UI: list[BaseRoute] = [
    DeclaredRoute("GET", "/ui", ui.entrance, Scope.NONE, statuses=(308,), lenient=True),
    DeclaredRoute("GET", "/ui/", ui.page, Scope.NONE, lenient=True),
    DeclaredRoute("POST", "/ui/session", ui.begin, Scope.NONE, ui.TokenBody, statuses=(401, 403)),
    DeclaredRoute("DELETE", "/ui/session", ui.end, Scope.NONE, statuses=(403,)),
    DeclaredRoute("GET", "/ui/{name}", ui.page, Scope.NONE, statuses=(304, 404), lenient=True),
]


def application(services: Services, door: Door) -> Starlette:
    """What is served at a door. Where nobody can have the scope admin, its routes are not there at all."""
    handlers = dict.fromkeys((AgentdError, HTTPException, ClientDisconnect, Exception), on_error)
    routes = API + (ADMIN + UI if door.has_admin else [])
    middleware = [Middleware(Cors)] if door.credentials else []
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)
    app.state.services, app.state.door = services, door
    app.router.redirect_slashes = False  # /v1/feedback/ is an unknown path, not a detour
    return app
