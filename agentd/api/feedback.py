"""POST /v1/feedback and /v1/examples: what the model is to learn from."""

import asyncio
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.classify import CLASSIFY_TASK, of_lists
from agentd.api.peers import author
from agentd.api.requests import only, parse, read, validate
from agentd.api.schemas import MAX_NAME, ExampleLine, FeedbackBody
from agentd.api.services import Services, services
from agentd.errors import InvalidLine, InvalidRequest, TooMuchFeedback
from agentd.safetensors_header import ClassifierHeader
from agentd.store import feedback, imports, lessons, tasks
from agentd.store.examples import NewExample
from agentd.store.feedback import NewFeedback
from agentd.store.tasks import Task


async def add_feedback(request: Request) -> Response:
    """201 with a new id, or 200 with the old one when the idempotency key was seen before."""
    s = services(request)
    only(request)
    body = await parse(request, FeedbackBody, s.config.serve.max_body)
    key = body.idempotency_key or request.headers.get("idempotency-key")
    if key is not None and len(key) > MAX_NAME:
        raise InvalidRequest(f"the Idempotency-Key is longer than {MAX_NAME} characters", param="idempotency_key")
    given = NewFeedback(
        inference_id=body.inference_id,
        kind=body.kind,
        value=body.value,
        task=body.task or body.metric,
        choices=body.choices,
        source=body.source,
        tags=body.tags,
        idempotency_key=key,
        author=author(request),
        quarantine=await _flooded(s, author(request), body),
    )
    row, created = await s.store.call(feedback.add, given, s.config.feedback.weights)
    answer = {"id": row.id, "created": created, "example_id": row.example_id, "task": row.task}
    if row.state != "accepted":
        answer |= {"state": row.state, "reason": row.reason}
    return JSONResponse(answer, 201 if created else 200)


async def _flooded(s: Services, who: str | None, body: FeedbackBody) -> str | None:
    """Why this piece is kept apart, if its source says more than anybody could mean. Raises TooMuchFeedback."""
    if body.kind not in lessons.KINDS:
        return None
    limits = s.config.feedback
    if not s.flood.exceeded(who, body.source, limits.limit):
        return None
    if await s.store.call(feedback.quarantined, who, body.source) >= limits.max_quarantined:
        raise TooMuchFeedback(limits.max_quarantined)
    return f"more than {limits.limit} a minute from this source (feedback.limit)"


async def add_examples(request: Request) -> Response:
    """A JSONL body, stored whole or not at all."""
    s = services(request)
    only(request)
    body = await read(request, s.config.serve.max_import, "serve.max_import")
    known = {task.name: task for task in await s.store.call(tasks.all)}
    # in a thread: a long body takes seconds, in which the others want their tokens
    new = await asyncio.to_thread(_parse_lines, body, known, s.model.classifier, author(request))
    if not new:
        raise InvalidRequest("the body holds no examples; send one JSON object a line")
    prepared = await asyncio.to_thread(imports.prepare, new)
    stored = await imports.add(s.store, prepared)
    return JSONResponse({**stored, "tasks": Counter(example.task for example in new)})


def _parse_lines(
    body: bytes, known: dict[str, Task], classifier: ClassifierHeader | None, who: str | None
) -> list[NewExample]:
    """The examples of a JSONL body, with the numbers of their lines. Raises InvalidLine for the first wrong one."""
    new = []
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            given = validate(line, ExampleLine)
            if classifier is None:
                new.append(_example(given, known, number, who))
            else:
                new.append(_classified(given, classifier, number, who))
        except InvalidRequest as error:
            raise InvalidLine(number, str(error)) from None
    return new


def _example(line: ExampleLine, known: dict[str, Task], number: int, who: str | None) -> NewExample:
    name = line.task or "default"
    task = known.get(name)
    if line.input is not None or line.png is not None:
        raise InvalidRequest("arrays and images are for a classifier; this is a language model")
    if line.text is not None:
        if task is None or not task.prompt:
            raise InvalidRequest(f"task {name!r} declares no prompt for a text; send messages or prompt")
        content = task.prompt.replace("{text}", line.text)
        input: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    elif line.messages is not None:
        input = {"messages": [message.plain() for message in line.messages]}
    else:
        input = {"prompt": line.prompt}
    kind, target = ("label", line.label) if line.label is not None else ("demonstration", line.completion)
    return NewExample(task=name, kind=kind, input=input, target=target or "", line=number, author=who)


def _classified(line: ExampleLine, classifier: ClassifierHeader, number: int, who: str | None) -> NewExample:
    if line.label is None:
        raise InvalidRequest("a classifier learns from labels")
    if line.input is not None:
        input = of_lists(line.input, classifier.network.input)
    elif line.png is not None:
        input = {"png": line.png}
    else:
        raise InvalidRequest("a classifier's examples have an input (nested lists of numbers) or a png (base64)")
    return NewExample(
        task=line.task or CLASSIFY_TASK, kind="label", input=input, target=line.label, line=number, author=who
    )
