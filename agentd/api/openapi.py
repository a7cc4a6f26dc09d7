"""GET /openapi.json: what this server takes, from the same schemas that its handlers check requests with."""

from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd import __version__
from agentd.api.access import access_of
from agentd.api.routes import OLLAMA, TEXT, DeclaredRoute


def document(routes: list[DeclaredRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of these routes."""
    models = [(model, "validation") for model in dict.fromkeys(route.body for route in routes if route.body)]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(route, path, method)
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type", "code"]}},
    }
    texts = {"type": "object", "required": ["error"], "properties": {"error": TEXT}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "agentd", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {**definitions["$defs"], "Error": error, "OllamaError": texts},
            "securitySchemes": {"key": _KEY},
        },
    }


def _operation(route: DeclaredRoute, path: str, method: str) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_") or "root"
    operation: dict[str, Any] = {"operationId": f"{method.lower()}_{name}", "responses": _responses(route)}
    operation["security"] = [{"key": route.scope.names}] if route.scope.names else []
    inside = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [{"name": n, "in": "path", "required": True, "schema": TEXT} for n in inside]
    parameters += [{"name": n, "in": "query", "schema": schema} for n, schema in route.query.items()]
    if parameters:
        operation["parameters"] = parameters
    if route.body:
        content = {route.media: {"schema": {"$ref": f"#/components/schemas/{route.body.__name__}"}}}
        operation["requestBody"] = {"required": not route.optional, "content": content}
    elif route.media != "application/json":
        content = {route.media: {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.description:
        operation["description"] = route.description
    return operation


def _responses(route: DeclaredRoute) -> dict[str, Any]:
    shape = f"#/components/schemas/{'OllamaError' if route.path.startswith(OLLAMA) else 'Error'}"
    failed = {"description": "what is wrong", "content": {"application/json": {"schema": {"$ref": shape}}}}
    codes: dict[str, Any] = {"200": {"description": "done"}}
    codes |= {str(code): {"description": "done"} if code < 300 else failed for code in route.statuses}
    return {**codes, "400": failed, "default": failed}


_KEY = {"type": "http", "scheme": "bearer", "description": "An API key; over UNIX sockets none is needed."}


async def serve(request: Request) -> Response:
    """What whoever asks may use."""
    scopes = access_of(request).scopes
    routes = [route for route in request.app.router.routes if isinstance(route, DeclaredRoute)]
    return JSONResponse(document([route for route in routes if route.scope in scopes]))
