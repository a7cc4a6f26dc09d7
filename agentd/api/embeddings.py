"""POST /v1/embeddings: texts as vectors, the served model's pooled states (engine/pooling.py). None of it is stored."""

import base64
import struct
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.lenient import Lenient, Text
from agentd.api.requests import ignored_fields, only, parse, refuse_unknown
from agentd.api.services import Services, services
from agentd.api.streaming import unless_left
from agentd.engine.protocol import Piece
from agentd.errors import InvalidRequest, NotALanguageModel
from agentd.ids import uuid7

_INPUTS = 2048  # of one request
_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingsBody(Lenient):
    """POST /v1/embeddings. One input is a text or a list of token numbers; `dimensions` is the model's width."""

    input: Text | _Tokens | Annotated[list[Text] | list[_Tokens], Field(min_length=1, max_length=_INPUTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _alike(cls, input: Any) -> Any:
        parts = input if isinstance(input, list) else [input]
        kinds = {type(part) for part in parts}
        if kinds not in ({str}, {int}, {list}) or kinds == {type(input)} == {int}:
            raise ValueError("input is a text, a list of texts, a list of token numbers, or a list of such lists")
        if len(parts) > _INPUTS and kinds != {int}:
            raise ValueError(f"{len(parts)} inputs are more than the {_INPUTS} of one request")
        if any(part in ("", []) for part in parts):
            raise ValueError("an input is empty")
        return input

    def inputs(self) -> list[dict[str, Any]]:
        """As the engine takes them."""
        several = isinstance(self.input, list) and not isinstance(self.input[0], int)
        return [{"prompt": each} for each in (self.input if several else [self.input])]


async def embeddings(request: Request) -> Response:
    s = services(request)
    only(request)
    body = await parse(request, EmbeddingsBody, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    name = s.resolve(body.model)
    pieces = await embedded(request, s, body.inputs(), body.dimensions)
    tokens = sum(piece.prompt_tokens for piece in pieces)
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(piece.embedding or [], body.encoding_format)}
            for i, piece in enumerate(pieces)
        ],
        "model": name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "agentd": {"revision": pieces[-1].revision},
    }
    return JSONResponse(answer, headers=ignored_fields(body))


async def embedded(request: Request, s: Services, inputs: list[dict[str, Any]], dimensions: int | None) -> list[Piece]:
    """The vectors of these inputs, one or more. Raises InvalidRequest, NotALanguageModel, ClientDisconnect."""
    if s.model.classifier:
        raise NotALanguageModel(s.model_name)
    width = s.supervisor.info.n_embd if s.supervisor.info else dimensions
    if dimensions not in (None, width):  # known before anything is computed
        raise InvalidRequest(f"the model has {width} dimensions, which are not cut", param="dimensions")
    return await unless_left(request, _pieces(s, inputs))


async def _pieces(s: Services, inputs: list[dict[str, Any]]) -> list[Piece]:
    """All of one revision: vectors of two cannot be compared. Raises InvalidRequest naming the input."""
    for _ in range(3):
        try:
            pieces = await s.supervisor.embed("embd-" + uuid7(), inputs)
        except InvalidRequest as error:
            error.param = "input"
            raise
        if len({piece.revision for piece in pieces}) == 1:
            break
    return pieces


def _encoded(vector: list[float], form: str) -> list[float] | str:
    """As numbers, or as base64 of float32, little-endian."""
    return vector if form == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
