"""The two applications: `api` for clients, `admin` with everything."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from agentd.api import (
    admin,
    backup,
    budget,
    classify,
    completions,
    embeddings,
    examples,
    feedback,
    forgetting,
    lenient,
    meta,
    openapi,
    response_body,
    responses,
    schemas,
    speed,
    transfer,
)
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
_LINES = "One JSON object a line; a body of one line is one example."

API: list[BaseRoute] = [
    DeclaredRoute("POST", "/v1/chat/completions", completions.chat_completions, schemas.ChatCompletion),
    DeclaredRoute("POST", "/v1/completions", completions.completions, schemas.TextCompletion),
    DeclaredRoute("POST", "/v1/responses", responses.responses, response_body.ResponsesBody),
    DeclaredRoute("GET", "/v1/responses/{id}", responses.show, statuses=(404,)),
    DeclaredRoute("DELETE", "/v1/responses/{id}", responses.delete, statuses=(404, 409)),
    DeclaredRoute(
        "GET",
        "/v1/responses/{id}/input_items",
        responses.input_items,
        query={**LIMIT, "order": {"enum": ["asc", "desc"]}, "after": TEXT},
        statuses=(404,),
    ),
    DeclaredRoute(
        "POST", "/v1/responses/{id}/cancel", responses.cancel, lenient.Lenient, statuses=(400, 404), optional=True
    ),
    DeclaredRoute("POST", "/v1/embeddings", embeddings.embeddings, embeddings.EmbeddingsBody),
    DeclaredRoute(
        "POST",
        "/v1/classify",
        classify.classify,
        schemas.ClassifyBody,
        query=dict.fromkeys(("model", "task", "shape", "dtype"), TEXT),
    ),
    DeclaredRoute("GET", "/v1/models", meta.models),
    DeclaredRoute("GET", "/v1/models/{model:path}", meta.model, statuses=(404,)),
    DeclaredRoute("POST", "/v1/feedback", feedback.add_feedback, schemas.FeedbackBody, statuses=(201, 404, 409, 429)),
    DeclaredRoute(
        "POST",
        "/v1/examples",
        examples.add_examples,
        schemas.ExampleLine,
        media="application/x-ndjson",
        description=_LINES,
    ),
    DeclaredRoute("GET", "/openapi.json", openapi.serve),
    DeclaredRoute("GET", "/health", meta.health, lenient=True),
    DeclaredRoute("GET", "/metrics", meta.metrics, lenient=True),
]

ADMIN: list[BaseRoute] = [
    DeclaredRoute("GET", "/admin/status", admin.status),
    DeclaredRoute("GET", "/admin/history", admin.history, query=LIMIT),
    DeclaredRoute("GET", "/admin/revisions", admin.list_revisions),
    DeclaredRoute("GET", "/admin/revisions/{id}", admin.show_revision, statuses=(404,)),
    DeclaredRoute(
        "GET", "/admin/revisions/{id}/replay", transfer.replay, query={"verify": BOOLEAN}, statuses=(404, 409)
    ),
    DeclaredRoute(
        "GET",
        "/admin/revisions/{id}/export",
        transfer.export,
        query={"format": {"enum": list(transfer.FORMATS)}},
        statuses=(404, 409),
    ),
    DeclaredRoute("POST", "/admin/import", transfer.import_revision, statuses=(202, 409), media="application/x-tar"),
    DeclaredRoute("GET", "/admin/passes", admin.list_passes, query=PAGE),
    DeclaredRoute("GET", "/admin/passes/{id}", admin.show_pass, statuses=(404,)),
    DeclaredRoute("GET", "/admin/progress", admin.progress),
    DeclaredRoute("POST", "/admin/adapt", admin.adapt, schemas.AdaptBody, statuses=(202, 409)),
    DeclaredRoute("POST", "/admin/cancel", admin.cancel, lenient.Body, statuses=(409,)),
    DeclaredRoute("POST", "/admin/rollback", admin.rollback, schemas.RollbackBody, statuses=(404, 409), optional=True),
    DeclaredRoute("POST", "/admin/speed", speed.speed, lenient.Body, statuses=(409,)),
    DeclaredRoute("POST", "/admin/pause", admin.pause, lenient.Body),
    DeclaredRoute("POST", "/admin/resume", admin.pause, lenient.Body),
    DeclaredRoute("POST", "/admin/forget", forgetting.forget, schemas.ForgetBody, statuses=(404,)),
    DeclaredRoute("POST", "/admin/rebuild", forgetting.rebuild, schemas.RebuildBody, statuses=(202, 404, 409)),
    DeclaredRoute("POST", "/admin/release", forgetting.release, schemas.ReleaseBody, statuses=(404, 409)),
    DeclaredRoute(
        "GET",
        "/admin/feedback",
        admin.list_feedback,
        query=_FEEDBACK,
    ),
    DeclaredRoute(
        "GET",
        "/admin/examples",
        admin.list_examples,
        query=_EXAMPLES,
    ),
    DeclaredRoute("GET", "/admin/tasks", admin.list_tasks),
    DeclaredRoute("POST", "/admin/tasks/{task}", admin.edit_task, schemas.TaskBody, statuses=(404, 409)),
    DeclaredRoute("POST", "/admin/tasks/{task}/recall", admin.set_recall, schemas.RecallBody, statuses=(404, 409)),
    DeclaredRoute("GET", "/admin/inferences", admin.list_inferences, query={**PAGE, "episode": TEXT}),
    DeclaredRoute("GET", "/admin/inferences/{inference}", admin.show_inference, statuses=(404,)),
    DeclaredRoute("GET", "/admin/backup", backup.download),
    DeclaredRoute("GET", "/admin/events", admin.list_events, query={**LIMIT, "after": PAGE["offset"]}),
    DeclaredRoute(
        "GET",
        "/admin/budget",
        budget.budget,
        query={"method": TEXT, "blocks": _BLOCKS},
    ),
]


def application(services: Services, *, with_admin: bool) -> Starlette:
    handlers = dict.fromkeys((AgentdError, HTTPException, ClientDisconnect, Exception), on_error)
    app = Starlette(routes=API + (ADMIN if with_admin else []), exception_handlers=handlers)
    app.state.services = services
    app.router.redirect_slashes = False  # /v1/feedback/ is an unknown path, not a detour
    return app
