"""Spans and metrics of answers for an OpenTelemetry collector, by the conventions for generative AI.

https://opentelemetry.io/docs/specs/semconv/gen-ai/. No text of anybody's is in them: how long, how many tokens, which
revision. Spans are sent in batches by a thread of their own, at most so many wait, and a collector that is away costs a
line in the log. Off unless `serve.telemetry` names a collector; needs the extra `otel`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agentd import __version__
from agentd.engine.protocol import Piece
from agentd.errors import InvalidConfig

_TIMEOUT = 5.0  # seconds for one batch
_EVERY = 30.0  # seconds between metrics
# The conventions' own bounds, in seconds.
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


@dataclass(frozen=True)
class Told:
    """An answer that is over. `seconds` since the request came, `first` of these before its first token; `error` is why
    it is no whole answer; `traceparent` the request's header of this name (W3C Trace Context)."""

    id: str
    operation: str  # chat or text_completion
    model: str
    last: Piece
    finish: str | None
    seconds: float
    first: float | None
    error: str | None = None
    task: str | None = None
    episode: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    traceparent: str | None = None


class Telemetry:
    """`endpoint` is the collector's address for OTLP over HTTP, such as http://collector:4318. What else the libraries
    want to know they read from OTEL_* in the environment. Raises InvalidConfig where they are missing."""

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InvalidConfig("serve.telemetry", [f"{error}: pip install 'agentd[otel]'"]) from None
        self._model, base = model, endpoint.rstrip("/")
        resource = Resource.create({"service.name": "agentd", "service.version": __version__})
        to: dict[str, Any] = {"timeout": _TIMEOUT}
        self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces", **to)))
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{base}/v1/metrics", **to), 1e3 * _EVERY)
        self._metrics = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._tracer, meter = self._traces.get_tracer("agentd", __version__), self._metrics.get_meter("agentd")

        def histogram(name: str, what: str, bounds: tuple[float, ...]) -> Any:
            return meter.create_histogram(
                f"gen_ai.server.{name}", "s", what, explicit_bucket_boundaries_advisory=list(bounds)
            )

        self._duration = histogram("request.duration", "From a request to the end of its answer", _DURATION)
        self._first = histogram("time_to_first_token", "From a request to its first token", _FIRST)
        self._token = histogram("time_per_output_token", "Of a token after the first", _TOKEN)

    def answered(self, told: Told) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        common: dict[str, Any] = {
            "gen_ai.operation.name": told.operation,
            "gen_ai.provider.name": "agentd",
            "gen_ai.request.model": told.model,
            "gen_ai.response.model": self._model,
        }
        if told.error:
            common["error.type"] = told.error
        about = {
            **common,
            "gen_ai.response.id": told.id,
            "gen_ai.usage.input_tokens": told.last.prompt_tokens,
            "gen_ai.usage.output_tokens": told.last.completion_tokens,
            "gen_ai.conversation.id": told.episode,
            "agentd.cached_tokens": told.last.cached_tokens,
            "agentd.revision": told.last.revision,
            "agentd.task": told.task,
            **{f"gen_ai.request.{name}": value for name, value in told.parameters.items()},
        }
        if told.finish:
            about["gen_ai.response.finish_reasons"] = [told.finish]
        end = time.time_ns()
        parent = None
        if told.traceparent:
            parent = TraceContextTextMapPropagator().extract({"traceparent": told.traceparent})
        span = self._tracer.start_span(
            f"{told.operation} {told.model}",
            parent,
            SpanKind.SERVER,
            {name: value for name, value in about.items() if value is not None},
            start_time=end - int(1e9 * told.seconds),
        )
        if told.error:
            span.set_status(Status(StatusCode.ERROR, told.error))
        span.end(end)
        self._duration.record(told.seconds, common)
        if told.first is not None and not told.error:
            self._first.record(told.first, common)
            if (more := told.last.completion_tokens - 1) > 0:
                self._token.record((told.seconds - told.first) / more, common)

    def close(self) -> None:
        """Sends what is left, which takes some seconds where nobody answers. For a thread."""
        self._traces.shutdown()
        self._metrics.shutdown()
