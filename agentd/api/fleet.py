"""/admin/fleet: what a client of the fleet asks of this board, and what its owner looks at. See docs/fleet.md."""

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.adapt import fleet
from agentd.adapt.fleet import Asked, Wish
from agentd.api.lenient import MAX_INTEGER, Body, Name
from agentd.api.requests import parse
from agentd.api.services import services
from agentd.errors import InvalidRequest, NotFound
from agentd.store.fleet import TAKE, TRAIN

LEAST_SEEDS, MOST_SEEDS = 8, 4096  # directions of one round
MAX_ROUND = 1 << 31
RUN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_SHA256 = r"^[0-9a-f]{64}$"
_BASE64 = 1 << 30  # characters; the body's own limit comes first

Sha256 = Annotated[str, Field(pattern=_SHA256)]


class FleetBody(Body):
    """What both actions have in common: whose fleet it is, which round, and what it learns on."""

    fleet: Name
    run: Annotated[str, Field(pattern=RUN)]
    number: Annotated[int, Field(ge=0, lt=MAX_ROUND)]
    base_sha256: Sha256
    engine: Literal["llamacpp", "transformers"]
    dtype: Annotated[str, Field(max_length=16)] = ""
    peer: Name | None = None

    def asked(self) -> Asked:
        names = ("fleet", "run", "number", "base_sha256", "engine", "dtype", "peer")
        return Asked(**{name: getattr(self, name) for name in names})


class TrainBody(FleetBody):
    """POST /admin/fleet/train. `kinds` are what the fleet takes, the most wanted first; `state` is the sha256 of the
    file that it has come to (left out: the base), `data` that file in base64 where the board may not have it;
    directions have the seeds from `first_seed` on."""

    kinds: Annotated[list[Literal["ledger", "adapter"]], Field(min_length=1, max_length=2)]
    state: Sha256 | None = None
    data: Annotated[str, Field(max_length=_BASE64)] | None = None
    first_seed: Annotated[int, Field(ge=0, le=MAX_INTEGER - MOST_SEEDS)] = 0
    seeds: Annotated[int, Field(ge=LEAST_SEEDS, le=MOST_SEEDS)] = 32


class TakeBody(FleetBody):
    """POST /admin/fleet/take. `data` is the file that the fleet has come to, in base64."""

    data: Annotated[str, Field(max_length=_BASE64)]


async def show_fleet(request: Request) -> Response:
    return JSONResponse(await services(request).fleet.status())


async def train(request: Request) -> Response:
    """202 while it is learned, 200 with what was recorded."""
    s = services(request)
    body = await parse(request, TrainBody, s.config.serve.max_import)
    wish = Wish(tuple(dict.fromkeys(body.kinds)), body.first_seed, body.seeds)
    data = None if body.data is None else _decoded(body.data)
    return _answer(fleet.shown(*await s.fleet.train(body.asked(), wish, body.state, data)))


async def take(request: Request) -> Response:
    """202 while it is judged, 200 with what was recorded."""
    s = services(request)
    body = await parse(request, TakeBody, s.config.serve.max_import)
    return _answer(fleet.shown(*await s.fleet.take(body.asked(), _decoded(body.data))))


async def show_round(request: Request) -> Response:
    """Both actions in a round, null for what was not asked for."""
    s, (run, number) = services(request), _round(request)
    known = {action: await s.fleet.round(run, number, action) for action in (TRAIN, TAKE)}
    if not any(known.values()):
        raise NotFound("round", f"{run}/{number}")
    return JSONResponse({action: fleet.shown(*both) if both else None for action, both in known.items()})


async def result(request: Request) -> Response:
    """What was made for a round. It has left the board then."""
    return Response(await services(request).fleet.result(*_round(request)), media_type="application/octet-stream")


async def figures(request: Request) -> Response:
    """What may be told of how the fleet's file did here. It has left the board then."""
    s = services(request)
    return JSONResponse(await s.fleet.figures(*_round(request), s.adaptation.files))


def _answer(row: dict[str, Any]) -> Response:
    return JSONResponse(row, 200 if row["done"] else 202)


def _round(request: Request) -> tuple[str, int]:
    run, raw = request.path_params["run"], request.path_params["number"]
    if not (raw.isascii() and raw.isdigit() and len(raw) < 11):
        raise NotFound("round", f"{run}/{raw}")
    return run, int(raw)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("data is not base64", param="data") from None
