"""Reading request bodies within bounds, and turning every failure into the error shape that clients expect."""

import json
import logging
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from agentd.api.schemas import Body, explain
from agentd.errors import AgentdError, BodyTooLarge, InvalidRequest, NotFound

logger = logging.getLogger(__name__)
B = TypeVar("B", bound=Body)


async def read(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is known to be longer than `limit` bytes."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(limit)
        parts.append(part)
    return b"".join(parts)


async def parse(request: Request, schema: type[B], limit: int) -> B:
    """The body as `schema`. Raises InvalidRequest saying every field that is wrong."""
    return validate(await read(request, limit) or b"{}", schema)


def validate(data: bytes | str, schema: type[B]) -> B:
    try:
        tree = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("the body must be a JSON object")
    if bad := _surrogate(data):
        raise InvalidRequest(bad)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise explain(error) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _surrogate(data: bytes | str) -> str | None:
    """Half a surrogate pair is valid JSON but no text: it could be neither tokenised nor stored."""
    text = data if isinstance(data, str) else data.decode("utf-8", "surrogatepass")
    if "\\u" not in text.lower():
        return None
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "the body holds half of a surrogate pair"
    return None


def error_body(error: AgentdError) -> dict[str, Any]:
    """{"error": {...}} as OpenAI has it; what else a pass was refused for comes along."""
    body: dict[str, Any] = {"message": str(error), "type": error.type, "code": error.code}
    if isinstance(error, InvalidRequest):
        body["param"] = error.param
    if getattr(error, "shortfall", 0):
        body["shortfall"] = error.shortfall  # type: ignore[attr-defined]  # only PassRefused has it
    return {"error": body}


async def on_error(request: Request, error: Exception) -> Response:
    """The one place where exceptions become answers."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            known: AgentdError = NotFound("resource", request.url.path)
        else:
            known = InvalidRequest(f"{error.detail}: {request.method} {request.url.path}")
        known.status = error.status_code
        return JSONResponse(error_body(known), error.status_code, headers=error.headers)
    if not isinstance(error, AgentdError):
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        error = AgentdError("internal error; the daemon's log has the details")
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error_body(error), error.status, headers=headers)


def number(request: Request, name: str, default: int, low: int, high: int) -> int:
    """An integer query parameter within bounds."""
    raw = request.query_params.get(name)
    if raw is None:
        return default
    try:
        value = int(raw)
    except ValueError:
        raise InvalidRequest(f"{name} must be a whole number, not {raw!r}", param=name) from None
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}", param=name)
    return value


def only(request: Request, *names: str) -> None:
    """Refuses query parameters that this resource does not have."""
    for name in request.query_params:
        if name not in names:
            raise InvalidRequest(
                f"unknown query parameter {name!r}; known here: {', '.join(names) or 'none'}", param=name
            )
