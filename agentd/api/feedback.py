"""POST /v1/feedback: what people and programs say of answers."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.access import author
from agentd.api.lenient import MAX_NAME
from agentd.api.requests import parse
from agentd.api.schemas import FeedbackBody
from agentd.api.services import Services, services
from agentd.errors import InvalidRequest, TooMuchFeedback
from agentd.store import feedback, feedback_targets
from agentd.store.feedback import NewFeedback


async def add_feedback(request: Request) -> Response:
    """201 with a new id, or 200 with the old one when the idempotency key was seen before."""
    s = services(request)
    body = await parse(request, FeedbackBody, s.config.serve.max_body)
    key = body.idempotency_key or request.headers.get("idempotency-key")
    if key is not None and len(key) > MAX_NAME:
        raise InvalidRequest(f"the Idempotency-Key is longer than {MAX_NAME} characters", param="idempotency_key")
    new = NewFeedback(
        inference_id=body.inference_id,
        episode=body.episode,
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
    row, created = await s.store.call(feedback.add, new, s.config.feedback.weights)
    answer = {"id": row.id, "created": created, "example_id": row.example_id, "task": row.task}
    if row.episode is not None:
        steps, n_examples = await s.store.call(feedback.parts, row.id)
        answer |= {"episode": row.episode, "steps": steps, "examples": n_examples}
    if row.reason is not None:
        answer |= {"state": row.state, "reason": row.reason}
    return JSONResponse(answer, 201 if created else 200)


async def _flooded(s: Services, who: str | None, body: FeedbackBody) -> str | None:
    """Why this piece is kept apart, if its source says more than anybody could mean. Raises TooMuchFeedback."""
    if body.kind not in feedback_targets.KINDS:
        return None
    limits = s.config.feedback
    if not s.rate_limiter.exceeded(who, body.source, limits.limit):
        return None
    if await s.store.call(feedback.quarantined, who, body.source) >= limits.max_quarantined:
        raise TooMuchFeedback(limits.max_quarantined)
    return f"more than {limits.limit} a minute from this source (feedback.limit)"
