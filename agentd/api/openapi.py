"""GET /openapi.json: what this server takes, from the same schemas that its handlers check requests with."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agentd import __version__
from agentd.api import schemas
from agentd.api.requests import only

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": schemas.ChatCompletion,
    "/v1/completions": schemas.TextCompletion,
    "/v1/feedback": schemas.FeedbackBody,
    "/v1/examples": schemas.ExampleLine,
    "/admin/adapt": schemas.AdaptBody,
    "/admin/rollback": schemas.RollbackBody,
    "/admin/cancel": schemas.Body,
    "/admin/pause": schemas.Body,
    "/admin/resume": schemas.Body,
    "/admin/forget": schemas.ForgetBody,
    "/admin/rebuild": schemas.RebuildBody,
    "/admin/release": schemas.ReleaseBody,
}
_LIMIT = {"limit": {"type": "integer", "minimum": 1, "maximum": 1000}}
_PAGE = {**_LIMIT, "offset": {"type": "integer", "minimum": 0, "maximum": 1 << 62}}
_TEXT = {"type": "string"}
_QUERIES: dict[str, dict[str, Any]] = {
    "/admin/history": _LIMIT,
    "/admin/passes": _PAGE,
    "/admin/inferences": _PAGE,
    "/admin/feedback": {
        **_PAGE,
        "kind": {"enum": list(schemas.KINDS)},
        "task": _TEXT,
        "state": {"enum": ["accepted", "duplicate", "outweighed", "quarantined"]},
        "author": _TEXT,
    },
    "/admin/examples": {
        **_PAGE,
        "task": _TEXT,
        "split": {"enum": ["train", "holdout"]},
        "state": {"enum": ["new", "used", "stale", "excluded"]},
    },
    "/admin/events": {**_LIMIT, "after": {"type": "integer", "minimum": 0, "maximum": 1 << 62}},
    "/admin/budget": {"method": _TEXT, "blocks": _TEXT},
}
# besides 200: what a request that fits its schema may still be answered with
_STATUSES = {
    "/v1/feedback": [201, 404, 409, 429],
    "/v1/models/{model}": [404],
    "/admin/revisions/{id}": [404],
    "/admin/passes/{id}": [404],
    "/admin/inferences/{inference}": [404],
    "/admin/adapt": [202, 409],
    "/admin/rebuild": [202, 404, 409],
    "/admin/cancel": [409],
    "/admin/rollback": [404, 409],
    "/admin/forget": [404],
    "/admin/release": [404, 409],
}


def document(routes: list[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of these routes."""
    models = [(model, "validation") for model in dict.fromkeys(_BODIES.values())]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(path, method)
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type", "code"]}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "agentd", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": {**definitions["$defs"], "Error": error}},
    }


def _operation(path: str, method: str) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_")
    operation: dict[str, Any] = {"operationId": f"{method.lower()}_{name}", "responses": _responses(path)}
    inside = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [{"name": n, "in": "path", "required": True, "schema": _TEXT} for n in inside]
    parameters += [{"name": n, "in": "query", "schema": schema} for n, schema in _QUERIES.get(path, {}).items()]
    if parameters:
        operation["parameters"] = parameters
    if method == "POST" and path in _BODIES:
        kind = "application/x-ndjson" if path == "/v1/examples" else "application/json"
        reference = {"$ref": f"#/components/schemas/{_BODIES[path].__name__}"}
        operation["requestBody"] = {"required": path != "/admin/rollback", "content": {kind: {"schema": reference}}}
        if path == "/v1/examples":
            operation["description"] = "One JSON object a line; a body of one line is one example."
    return operation


def _responses(path: str) -> dict[str, Any]:
    failed = {"description": "what is wrong", "content": {"application/json": {"schema": {"$ref": _ERROR}}}}
    codes: dict[str, Any] = {"200": {"description": "done"}}
    codes |= {str(code): {"description": "done"} if code < 300 else failed for code in _STATUSES.get(path, [])}
    return {**codes, "400": failed, "default": failed}


_ERROR = "#/components/schemas/Error"


async def serve(request: Request) -> Response:
    only(request)
    routes = [route for route in request.app.router.routes if isinstance(route, Route)]
    return JSONResponse(document(routes))
