"""POST /v1/feedback and /v1/examples: what the model is to learn from."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.requests import only, parse, read, validate
from agentd.api.schemas import ExampleLine, FeedbackBody
from agentd.api.services import services
from agentd.errors import AgentdError, InvalidLine, InvalidRequest
from agentd.store import examples, feedback, tasks
from agentd.store.examples import NewExample
from agentd.store.feedback import NewFeedback
from agentd.store.tasks import Task


async def add_feedback(request: Request) -> Response:
    """201 with a new id, or 200 with the old one when the idempotency key was seen before."""
    s = services(request)
    only(request)
    body = await parse(request, FeedbackBody, s.config.serve.max_body)
    given = NewFeedback(
        inference_id=body.inference_id,
        kind=body.kind,
        value=body.value,
        task=body.task or body.metric,
        choices=body.choices,
        source=body.source,
        tags=body.tags,
        idempotency_key=body.idempotency_key or request.headers.get("idempotency-key"),
    )
    row, created = await s.store.call(feedback.add, given)
    answer = {"id": row.id, "created": created, "example_id": row.example_id, "task": row.task}
    return JSONResponse(answer, 201 if created else 200)


async def add_examples(request: Request) -> Response:
    """A JSONL body, stored whole or not at all."""
    s = services(request)
    only(request)
    known = {task.name: task for task in await s.store.call(tasks.all)}
    new: list[NewExample] = []
    counts: dict[str, int] = {}
    for number, line in enumerate((await read(request, s.config.serve.max_import)).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            example = _example(validate(line, ExampleLine), known)
        except AgentdError as error:
            raise InvalidLine(number, str(error)) from None
        new.append(example)
        counts[example.task] = counts.get(example.task, 0) + 1
    if not new:
        raise InvalidRequest("the body holds no examples; send one JSON object a line")
    stored = await s.store.call(_store, new)
    return JSONResponse({**stored, "tasks": counts})


def _store(db: Any, new: list[NewExample]) -> dict[str, int]:
    return examples.add_many(db, new)


def _example(line: ExampleLine, known: dict[str, Task]) -> NewExample:
    task = known.get(line.task)
    if line.text is not None:
        if task is None or not task.prompt:
            raise InvalidRequest(f"task {line.task!r} declares no prompt for a text; send messages or prompt")
        content = task.prompt.replace("{text}", line.text)
        input: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    elif line.messages is not None:
        input = {"messages": [message.plain() for message in line.messages]}
    else:
        input = {"prompt": line.prompt}
    kind, target = ("label", line.label) if line.label is not None else ("demonstration", line.completion)
    return NewExample(task=line.task, kind=kind, input=input, target=target or "", source_inference_id=None)
