"""/admin/keys: API keys are made, listed and revoked."""

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.access import scope_of
from agentd.api.lenient import Body
from agentd.api.requests import parse
from agentd.api.services import services
from agentd.store import api_keys

MAX_RATE = 10_000  # requests a minute


class KeyBody(Body):
    """POST /admin/keys. `rate` is in requests a minute; left out: as many as it likes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    scopes: Annotated[list[Literal["ask", "feedback", "admin"]], Field(min_length=1, max_length=3)]
    rate: Annotated[int, Field(ge=1, le=MAX_RATE)] | None = None


async def list_keys(request: Request) -> Response:
    rows = await services(request).store.call(api_keys.all)
    return JSONResponse({"keys": [row.shown() for row in rows]})


async def add_key(request: Request) -> Response:
    """201 with the key itself, which no one can see again."""
    s = services(request)
    body = await parse(request, KeyBody, s.config.serve.max_body)
    text, row = await s.keys.add(body.name, scope_of(body.scopes), body.rate)
    return JSONResponse({**row.shown(), "key": text}, 201)


async def revoke_key(request: Request) -> Response:
    await parse(request, Body, 1024)
    return JSONResponse((await services(request).keys.revoke(request.path_params["name"])).shown())
