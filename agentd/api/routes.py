"""A route with all it takes: who may come in, queries, bodies and /openapi.json, from one declaration."""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentd.api.access import Scope, admit
from agentd.errors import InvalidRequest

OLLAMA = "/api/"  # the paths of Ollama's API, whose errors are {"error": "..."}
TEXT: dict[str, Any] = {"type": "string"}
BOOLEAN: dict[str, Any] = {"enum": ["true", "false"]}
LIMIT: dict[str, Any] = {"limit": {"type": "integer", "minimum": 1, "maximum": 1000}}
PAGE: dict[str, Any] = {**LIMIT, "offset": {"type": "integer", "minimum": 0, "maximum": 1 << 62}}


class DeclaredRoute(Route):
    """`scope` is what a request needs to be let in. `query` has the JSON schema of each parameter: an integer with
    bounds, an enum, or a text, perhaps of a pattern.
    `statuses` are those besides 200 that a request which fits may be answered with. `body` is the model of the body."""

    def __init__(
        self,
        method: str,
        path: str,
        handler: Callable[[Request], Awaitable[Response]],
        scope: Scope,
        body: type[BaseModel] | None = None,
        *,
        query: Mapping[str, dict[str, Any]] | None = None,
        statuses: tuple[int, ...] = (),
        media: str = "application/json",
        optional: bool = False,
        description: str | None = None,
        lenient: bool = False,
    ) -> None:
        self.scope, self.body, self.query, self.statuses = scope, body, dict(query or {}), statuses
        self.media, self.optional, self.description, self.lenient = media, optional, description, lenient

        async def checked(request: Request) -> Response:
            await admit(request, scope)
            if not lenient:  # probes and scrapers put words of their own into a query
                check(request, self.query)
            request.state.body_model = body
            return await handler(request)

        super().__init__(path, checked, methods=[method], name=handler.__name__)


def check(request: Request, query: Mapping[str, dict[str, Any]]) -> None:
    """Raises InvalidRequest for a parameter that is not declared, or a value that its schema does not have."""
    for name, value in request.query_params.multi_items():
        if name not in query:
            known = ", ".join(query) or "none"
            raise InvalidRequest(f"unknown query parameter {name!r}; known here: {known}", param=name)
        schema = query[name]
        if "enum" in schema and value not in schema["enum"]:
            raise InvalidRequest(f"{name} is one of {', '.join(schema['enum'])}, not {value!r}", param=name)
        if "pattern" in schema and not re.search(schema["pattern"], value):
            raise InvalidRequest(f"{name} must be {schema['description']}, not {value!r}", param=name)
        if schema.get("type") == "integer":
            low, high = schema["minimum"], schema["maximum"]
            try:
                number = int(value)
            except ValueError:
                raise InvalidRequest(f"{name} must be a whole number, not {value!r}", param=name) from None
            if not low <= number <= high:
                raise InvalidRequest(f"{name} must be between {low} and {high}", param=name)
