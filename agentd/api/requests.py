"""Reading request bodies within bounds, and turning every failure into the error shape that clients expect."""

import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from agentd.api.lenient import MAX_NAME, Body, Lenient
from agentd.api.routes import OLLAMA
from agentd.api.schemas import explain
from agentd.errors import AgentdError, BodyTooLarge, BodyTooSlow, InvalidRequest, NotFound, TooManyRequests

logger = logging.getLogger(__name__)
B = TypeVar("B", bound=Body)

SILENCE = 30.0  # seconds without a byte after which an unfinished body is given up
_NAME, _NAMES = 64, 32  # characters and number of the fields that a header names
_LARGE = re.compile(r"\d[eE]\+?\d|\d{300}")  # what a number looks like that may be larger than any
_DEPTH = 64  # of nested objects and lists; deeper ones would exhaust the stack of whoever walks through them


async def read(request: Request, limit: int, key: str = "serve.max_body") -> bytes:
    """The body, given up as soon as it is known to be longer than `limit` bytes, which `key` configures.

    Raises BodyTooLarge, BodyTooSlow.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(limit, key)
    parts: list[bytes] = []
    size = 0
    stream: AsyncIterator[bytes] = request.stream()
    while True:
        try:
            with anyio.fail_after(SILENCE):
                part = await anext(stream)
        except StopAsyncIteration:
            return b"".join(parts)
        except TimeoutError:
            raise BodyTooSlow(SILENCE) from None
        size += len(part)
        if size > limit:
            raise BodyTooLarge(limit, key)
        parts.append(part)


async def parse(request: Request, schema: type[B], limit: int) -> B:
    """The body as `schema`, which is the one that the route declares. Raises InvalidRequest saying every field that is
    wrong."""
    declared = getattr(request.state, "body_model", schema)
    if declared is not schema:
        raise TypeError(f"{request.url.path} declares {declared} and parses {schema}")
    return validate(await read(request, limit) or b"{}", schema)


def validate(data: bytes, schema: type[B]) -> B:
    """JSON as `schema`. Raises InvalidRequest saying every field that is wrong."""
    try:
        text = data.decode("utf-8-sig")
        tree = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}") from None
    except RecursionError:
        raise InvalidRequest(f"nested more than {_DEPTH} levels deep") from None
    except (json.JSONDecodeError, _NotJson) as error:
        raise InvalidRequest(f"not valid JSON: {error}") from None
    except ValueError:  # Python's guard against numbers that take quadratic time
        raise InvalidRequest("a number has too many digits") from None
    if not isinstance(tree, dict):
        raise InvalidRequest(f"must be a JSON object, not {_kind(tree)}")
    if text.count("{") + text.count("[") > _DEPTH and _deeper(tree, _DEPTH):
        raise InvalidRequest(f"nested more than {_DEPTH} levels deep")
    if "\\u" in text and not _encodable(tree):
        raise InvalidRequest("a text holds half of a surrogate pair, which no UTF-8 text can")
    try:
        body = schema.model_validate(tree)
    except ValidationError as error:
        raise explain(error) from None
    if _LARGE.search(text) and (endless := next((name for name in tree if not _finite(tree[name])), None)) is not None:
        raise InvalidRequest(f"{endless}: a number is too large to be one", param=endless)
    return body


class _NotJson(Exception):
    pass


def _refuse_constant(name: str) -> Any:
    raise _NotJson(f"{name} is not a number that JSON has")


def _kind(tree: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(tree), "null")


def _deeper(tree: Any, levels: int) -> bool:
    """Whether objects and lists are nested more than `levels` deep; looks no deeper."""
    inner = list(tree.values()) if isinstance(tree, dict) else tree
    containers = [value for value in inner if isinstance(value, dict | list)]
    return levels == 0 or any(_deeper(value, levels - 1) for value in containers)


def _finite(tree: Any) -> bool:
    """1e400 is valid JSON, and would be written as Infinity, which is none."""
    try:
        json.dumps(tree, allow_nan=False)
    except ValueError:
        return False
    return True


def _encodable(tree: Any) -> bool:
    """Half a surrogate pair is valid JSON but no text: it could be neither tokenised nor stored."""
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def error_body(error: AgentdError) -> dict[str, Any]:
    """{"error": {...}} as OpenAI has it; what else a pass was refused for comes along."""
    body: dict[str, Any] = {"message": str(error), "type": error.type, "code": error.code}
    if isinstance(error, InvalidRequest):
        body["param"] = error.param
    if getattr(error, "shortfall", 0):
        body["shortfall"] = error.shortfall  # type: ignore[attr-defined]  # only PassRefused has it
    return {"error": body}


def _error_of(request: Request, error: AgentdError) -> dict[str, Any]:
    """The error as the API has it that was asked: in Ollama's it is a text."""
    return {"error": str(error)} if request.url.path.startswith(OLLAMA) else error_body(error)


def refuse_unknown(body: Lenient, strict: bool) -> None:
    """Raises InvalidRequest for a field that is not known, with serve.strict."""
    if strict and (unknown := body.unknown()):
        raise InvalidRequest(f"unknown field {unknown[0]} (serve.strict)", param=unknown[0])


def ignored_fields(body: Lenient) -> dict[str, str]:
    """The header that names what had no effect; a client's names may hold anything, a header may not."""
    # A field may be called "", and a header's value must not end with a blank.
    names = [quote(name[:_NAME], safe="") or '""' for name in body.ignored()[:_NAMES]]
    return {"x-agentd-ignored": ", ".join(names)} if names else {}


def episode(request: Request, metadata: Mapping[str, str] | None) -> str | None:
    """What a request says it is a step of. Raises InvalidRequest where it says two things, or too much."""
    named, header = (metadata or {}).get("episode"), request.headers.get("x-agentd-episode")
    if named is not None and header is not None and named != header:
        raise InvalidRequest("metadata.episode and the header x-agentd-episode differ", param="metadata")
    name = named if named is not None else header
    if name is not None and not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise InvalidRequest(f"an episode's name has 1 to {MAX_NAME} characters that can be seen", param="metadata")
    return name


async def on_error(request: Request, error: Exception) -> Response:
    """The one place where exceptions become answers."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            known: AgentdError = NotFound("resource", request.url.path)
        else:
            allowed = (error.headers or {}).get("Allow")
            hint = f"; it takes {allowed}" if allowed else ""
            known = InvalidRequest(f"{error.detail}: {request.method} {request.url.path}{hint}")
            known.code = "method_not_allowed" if error.status_code == 405 else known.code
        known.status = error.status_code
        return JSONResponse(_error_of(request, known), error.status_code, headers=error.headers)
    if not isinstance(error, AgentdError):
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        error = AgentdError("internal error; the daemon's log has the details")
    headers = {"Retry-After": "1"} if error.status == 503 else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = "60"
    if error.status == 408:
        headers["Connection"] = "close"  # where the next request would begin is not known
    return JSONResponse(_error_of(request, error), error.status, headers=headers)


def number(request: Request, name: str, default: int) -> int:
    """An integer query parameter, whose bounds the route has checked."""
    return int(request.query_params.get(name, default))


def identifier(request: Request, noun: str) -> int:
    """The number at the end of the path. Raises NotFound for what cannot be one, or is none that SQLite could hold."""
    raw: str = request.path_params["id"]
    if raw.isascii() and raw.isdigit() and len(raw) < 19:
        return int(raw)
    raise NotFound(noun, raw)


def only(request: Request, *names: str) -> None:
    """Refuses query parameters that this resource does not have."""
    for name in request.query_params:
        if name not in names:
            raise InvalidRequest(
                f"unknown query parameter {name!r}; known here: {', '.join(names) or 'none'}", param=name
            )
