"""POST /v1/classify: an array as JSON or as bytes, or a PNG image, to the probabilities of a classifier's classes.

The answer's `id` is the inference id that feedback names; `agentd.revision` says which revision gave it.
"""

import array
import base64
import logging
import math
import struct
import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.lenient import MAX_NAME
from agentd.api.requests import read, validate
from agentd.api.schemas import ClassifyBody
from agentd.api.services import Services, services
from agentd.engine.protocol import Classification
from agentd.errors import AgentdError, InvalidRequest, NotAClassifier
from agentd.ids import now, uuid7
from agentd.store import scores
from agentd.store.inferences import Inference

logger = logging.getLogger(__name__)

CLASSIFY_TASK = "classify"
"""The task that feedback on a classification belongs to, unless the request names another."""

_SIZES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float16": 2, "float32": 4, "float64": 8}
_FLOATS = {"float16": "<e", "float32": "<f", "float64": "<d"}


async def classify(request: Request) -> Response:
    s = services(request)
    header = s.model.classifier
    if header is None:
        raise NotAClassifier(s.model_name)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    data = await read(request, s.config.serve.max_body)
    query: dict[str, str | None] = {name: request.query_params.get(name) for name in ("model", "task")}
    if kind == "application/json":
        body = validate(data or b"{}", ClassifyBody)
        query = {"model": body.model or query["model"], "task": body.task or query["task"]}
        input = of_lists(body.input, header.network.input)
    elif kind == "application/octet-stream":
        input = _of_bytes(request, data, header.network.input)
    elif kind == "image/png":
        input = {"png": base64.b64encode(data).decode()}
    else:
        raise InvalidRequest(
            f"the content type is application/json, application/octet-stream or image/png, not {kind!r}",
            param="Content-Type",
        )
    name = s.resolve(query["model"])
    task = query["task"] or CLASSIFY_TASK
    if len(task) > MAX_NAME:
        raise InvalidRequest(f"the name of a task has at most {MAX_NAME} characters", param="task")
    created, start = now(), time.perf_counter()
    answer = await s.supervisor.classify(input)
    return JSONResponse(await _record(s, name, input, task, answer, created, start))


async def _record(
    s: Services, model: str, input: dict[str, Any], task: str, answer: Classification, created: str, start: float
) -> dict[str, Any]:
    """Stores the inference and returns the response; a full disk must not keep the device from answering."""
    assert s.model.classifier is not None
    probabilities = dict(zip(s.model.classifier.classes, answer.probabilities, strict=True))
    label = max(probabilities, key=probabilities.__getitem__)
    latency = 1e3 * (time.perf_counter() - start)
    row = Inference(
        id="cls-" + uuid7(),
        created_at=created,
        revision=answer.revision,
        kind="classification",
        task=task,
        input=input,
        output=label,
        params={"probability": probabilities[label]},
        finish_reason="stop",
        prompt_tokens=0,
        completion_tokens=0,
        ttft_ms=None,
        latency_ms=latency,
    )
    about: dict[str, Any] = {"revision": answer.revision}
    try:
        await s.store.call(scores.record, row)
    except AgentdError as error:
        logger.error("inference %s was not recorded: %s", row.id, error)
        about["recorded"] = False
    return {
        "id": row.id,
        "object": "classification",
        "created": int(time.time()),
        "model": model,
        "label": label,
        "probabilities": probabilities,
        "agentd": about,
    }


def of_lists(tree: list[Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Nested lists of numbers as an array of float32. Raises InvalidRequest saying where they do not fit."""
    values = array.array("f")
    try:
        values.extend(_walk(tree, shape, "input"))
    except OverflowError:
        raise InvalidRequest("input has a number too large for float32", param="input") from None
    if not all(map(math.isfinite, values)):
        raise InvalidRequest("input has a number too large for float32", param="input")
    data = struct.pack(f"<{len(values)}f", *values)
    return _array("float32", shape, data)


def _walk(tree: Any, shape: tuple[int, ...], where: str) -> Iterator[float]:
    if not shape:
        if isinstance(tree, bool) or not isinstance(tree, int | float):
            raise InvalidRequest(f"{where} is no number", param="input")
        yield float(tree)
        return
    if not isinstance(tree, list):
        raise InvalidRequest(f"{where} is no list; {shape[0]} entries are needed there", param="input")
    if len(tree) != shape[0]:
        raise InvalidRequest(f"{where} has {len(tree)} entries, and {shape[0]} are needed there", param="input")
    for i, item in enumerate(tree):
        yield from _walk(item, shape[1:], f"{where}[{i}]")


def _of_bytes(request: Request, data: bytes, shape: tuple[int, ...]) -> dict[str, Any]:
    """Little-endian entries in row-major order; shape and dtype are in the query or in headers of agentd's own."""
    declared = request.query_params.get("shape") or request.headers.get("agentd-shape")
    dtype = request.query_params.get("dtype") or request.headers.get("agentd-dtype")
    expected = ",".join(map(str, shape))
    if declared is None or dtype is None:
        missing = "shape" if declared is None else "dtype"
        raise InvalidRequest(
            f"bytes need a shape and a dtype: ?shape={expected}&dtype=uint8, or headers Agentd-Shape and Agentd-Dtype",
            param=missing,
        )
    if declared.replace(" ", "") != expected:
        raise InvalidRequest(f"the array has shape {declared}, and the model takes {expected}", param="shape")
    if dtype not in _SIZES:
        raise InvalidRequest(f"dtype is one of {', '.join(_SIZES)}, not {dtype!r}", param="dtype")
    needed = math.prod(shape) * _SIZES[dtype]
    if len(data) != needed:
        raise InvalidRequest(
            f"the body has {len(data)} bytes, and {needed} are needed for shape {expected} of {dtype}", param="input"
        )
    if dtype in _FLOATS and not all(math.isfinite(value) for (value,) in struct.iter_unpack(_FLOATS[dtype], data)):
        raise InvalidRequest("the array has entries that are NaN or infinite", param="input")
    return _array(dtype, shape, data)


def _array(dtype: str, shape: tuple[int, ...], data: bytes) -> dict[str, Any]:
    return {"array": {"dtype": dtype, "shape": list(shape), "data": base64.b64encode(data).decode()}}
