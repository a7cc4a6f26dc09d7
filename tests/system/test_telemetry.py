"""Spans and metrics of a real daemon, as a collector gets them over HTTP."""

import base64
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tools.daemon import DaemonProcess, eventually

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "Where is the key under the mat?"


class Collector:
    """What was posted, by path."""

    def __init__(self) -> None:
        received: dict[str, list[bytes]] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    data = gzip.decompress(data)
                received.setdefault(self.path, []).append(data)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.received = received
        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[dict[str, Any]]:
        from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = []
        for data in self.received.get("/v1/traces", []):
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                found += [MessageToDict(span) for scope in resource.scope_spans for span in scope.spans]
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def about(span: dict[str, Any]) -> dict[str, Any]:
    return {each["key"]: next(iter(each["value"].values())) for each in span["attributes"]}


def test_answers_are_spans_without_a_text(collector: Collector) -> None:
    with DaemonProcess(settings={"serve": {"telemetry": {"endpoint": collector.address}}}) as daemon:
        daemon.start()
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 40, "temperature": 0.5, "seed": 3}
        body["metadata"] = {"task": "keys", "episode": "walk-1"}
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "content-type": "application/json"}
        body["choices"] = ["Under the mat it is.", "Under the mat it is not."]
        answer = daemon.post("/v1/chat/completions", body, headers=headers)
        assert answer.status == 200
        assert daemon.post("/v1/completions", {"prompt": "x", "grammar": "root ::= nothing"}).status == 400
        assert daemon.stop() == 0
    chat, wrong = sorted(collector.spans(), key=lambda span: span["name"])
    said = about(chat)
    assert chat["name"].startswith("chat ")
    assert said["gen_ai.response.id"] == answer.json["id"]
    assert said["gen_ai.usage.output_tokens"] == str(answer.json["usage"]["completion_tokens"])
    assert said["gen_ai.usage.input_tokens"] == str(answer.json["usage"]["prompt_tokens"])
    assert said["agentd.revision"] == "0"
    assert (said["agentd.task"], said["gen_ai.conversation.id"]) == ("keys", "walk-1")
    assert (said["gen_ai.request.temperature"], said["gen_ai.request.max_tokens"]) == (0.5, "40")
    seconds = (int(chat["endTimeUnixNano"]) - int(chat["startTimeUnixNano"])) / 1e9
    assert 0 < seconds < 60
    assert about(wrong)["error.type"] == "invalid_request"
    assert wrong["status"]["code"] == "STATUS_CODE_ERROR"
    everything = b"".join(data for parts in collector.received.values() for data in parts)
    assert b"gen_ai.server.time_to_first_token" in everything
    assert SECRET.encode() not in everything
    assert (
        answer.json["choices"][0]["message"]["content"].encode() not in everything
        or len(answer.json["choices"][0]["message"]["content"]) < 4
    )
    assert base64.b64decode(chat["traceId"]).hex() == TRACE
    assert base64.b64decode(chat["parentSpanId"]).hex() == SPAN


def test_a_collector_that_is_away_costs_nothing(collector: Collector) -> None:
    collector.close()
    with DaemonProcess(settings={"serve": {"telemetry": {"endpoint": collector.address}}}) as daemon:
        daemon.start()
        assert daemon.ask(max_tokens=2).status == 200
        assert eventually(lambda: daemon.ask(max_tokens=2).status == 200)
        assert daemon.stop() == 0
