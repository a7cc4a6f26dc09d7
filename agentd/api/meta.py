"""What the server is: models, health, metrics. None of these wakes the engine or waits for it; health says whether its
serving loop turns."""

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from agentd import __version__
from agentd.api.access import Scope, access_of
from agentd.api.services import Services, services
from agentd.host import memory
from agentd.store import examples, feedback, revisions

if TYPE_CHECKING:
    from prometheus_client.core import Metric


async def models(request: Request) -> Response:
    s = services(request)
    about = await _model(s)
    aliases = [{**about, "id": name, "agentd": {**about["agentd"], "alias_of": s.model_name}} for name in _aliases(s)]
    return JSONResponse({"object": "list", "data": [about, *aliases]})


async def model(request: Request) -> Response:
    s = services(request)
    name = s.resolve(request.path_params["model"])
    about = await _model(s)
    if name != s.model_name:
        about["agentd"]["alias_of"] = s.model_name
    return JSONResponse({**about, "id": name})


def _aliases(s: Services) -> list[str]:
    return [name for name in s.config.serve.aliases if name != s.model_name]


async def _model(s: Services) -> dict[str, Any]:
    serving = s.supervisor.revision
    row = await s.store.call(revisions.get, serving)
    return {
        "id": s.model_name,
        "object": "model",
        "created": s.model_created,
        "owned_by": "agentd",
        "agentd": {"revision": serving, "parent": row.parent, "base_sha256": s.model.sha256},
    }


async def health(request: Request) -> Response:
    s = services(request)
    status = "stalled" if s.supervisor.stalled else "ok" if s.supervisor.ready else "loading"
    body: dict[str, Any] = {"status": status}
    if Scope.ASK in access_of(request).scopes:  # others hear only whether it is well
        body |= {"revision": s.supervisor.revision, "model": s.model_name}
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """Prometheus text format; base units."""
    s = services(request)
    serving = s.supervisor.revision
    row = await s.store.call(revisions.get, serving)
    outcomes = await s.store.call(s.adaptation.outcomes)
    stored = {
        "examples_new": ("Examples that no pass has learned yet.", await s.store.call(examples.count_new)),
        "feedback_stored": ("Pieces of feedback that are stored.", await s.store.call(feedback.count)),
        "feedback_quarantined": (
            "Those that wait for an owner.",
            await s.store.call(feedback.count, {"state": "quarantined"}),
        ),
    }
    about = {"revision": str(serving), "parent": str(row.parent or 0)}
    text = await asyncio.to_thread(_exposed, s, about, outcomes, stored)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _exposed(
    s: Services, revision: dict[str, str], outcomes: dict[str, int], stored: dict[str, tuple[str, int]]
) -> bytes:
    """What is counted elsewhere, as it is now."""
    from prometheus_client import CollectorRegistry, generate_latest  # 30 ms that the daemon's start need not take
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector

    gauge, counter = GaugeMetricFamily, CounterMetricFamily

    class Now(Collector):
        def collect(self) -> "Iterator[Metric]":
            build = gauge("agentd_build_info", "The version that runs.", labels=("version",))
            build.add_metric((__version__,), 1)
            yield build
            yield gauge("agentd_uptime_seconds", "Since the daemon started.", value=time.monotonic() - s.started)
            base = {**revision, "base_sha256": s.model.sha256}
            info = gauge("agentd_revision_info", "The revision that serves.", labels=tuple(base))
            info.add_metric(tuple(base.values()), 1)
            yield info
            answered = counter("agentd_requests", "Requests that have ended.", labels=("outcome",))
            answered.add_metric(("served",), s.activity.served)
            answered.add_metric(("failed",), s.activity.failed)
            yield answered
            yield gauge("agentd_requests_processing", "Requests that are being answered.", value=s.activity.active)
            waiting = max(0, s.activity.active - s.config.serve.slots)
            yield gauge("agentd_requests_waiting", "Requests that wait for a slot.", value=waiting)
            tokens = counter("agentd_tokens", "Tokens of answers that have ended.", labels=("kind",))
            for kind in ("prompt", "cached", "completion"):
                tokens.add_metric((kind,), getattr(s.traffic, f"{kind}_tokens"))
            yield tokens
            for name, what, seconds in (
                ("agentd_time_to_first_token_seconds", "From a request to its first token.", s.traffic.first_token),
                ("agentd_answer_seconds", "From a request to the end of its answer.", s.traffic.answer),
            ):
                yield HistogramMetricFamily(name, what, buckets=seconds.buckets(), sum_value=seconds.sum)
            yield gauge("agentd_memory_available_bytes", "What the system has left.", value=memory.read().available)
            yield gauge("agentd_memory_reserve_bytes", "Of it, what a pass leaves.", value=s.config.memory.reserve)
            resident = gauge("agentd_process_memory_bytes", "Memory of each process (PSS).", labels=("process",))
            for name, size in s.adaptation.processes().items():
                if size is not None:
                    resident.add_metric((name,), size)
            yield resident
            for name, (what, n) in stored.items():
                yield gauge(f"agentd_{name}", what, value=n)
            yield counter("agentd_engine_restarts", "Restarts of the engine's process.", value=s.supervisor.restarts)
            passes = counter("agentd_adaptation_passes", "Passes that have ended.", labels=("outcome",))
            for name, n in sorted(outcomes.items()):
                passes.add_metric((name,), n)
            yield passes

    registry = CollectorRegistry()
    registry.register(Now())
    return generate_latest(registry)
