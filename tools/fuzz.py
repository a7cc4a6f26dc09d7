"""Schema-driven fuzzing of a running daemon, over its socket: `python -m tools.fuzz [--cases 5000] [--socket PATH]`.

Schemathesis makes the requests from the daemon's own /openapi.json: what the schema allows, and what it does not. Every
answer must come, none may be a 5xx, what the schema forbids must be refused, errors must have their shape; and memory
and descriptors must stay where they are. With --hostile N it sends constraints of answers that are meant to hurt
(tools/hostile.py), with --keys N it tries to get in over TCP where it may not (tools/intruders.py). Without --socket, a
daemon with a tiny model is started for it.
"""

import argparse
import contextlib
import http.client
import json
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tools.daemon import DaemonProcess, end_daemons_on_sigterm
from tools.hostile import Attack, attack

SECONDS = 30.0  # after which an answer counts as missing
GROWTH = 48 * 2**20  # bytes by which a process may have grown since every operation was tried
_EACH = 20  # cases of one operation at a time
_TOKENS = 3  # of an answer, when the case would have it as long as it likes
_OLLAMA = {"/api/chat", "/api/generate"}
_ANSWERS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", *_OLLAMA}
_LENIENT = {"/v1/examples"}  # a body of lines, which the schema has no word for
schemathesis.serializer.alias("application/x-ndjson", "application/json")  # one line
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")  # of nonsense
_MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@dataclass
class Report:
    """What came back. `problems` are the cases that must not be."""

    cases: int = 0
    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        statuses = ", ".join(f"{status}: {n}" for status, n in sorted(self.statuses.items()))
        lines = [f"{self.cases} cases in {self.seconds:.0f} s ({statuses})"]
        lines += [f"{name}: {self.before.get(name, 0)} → {self.after[name]}" for name in self.after]
        lines += [f"{len(self.problems)} problems", *self.problems[:20]]
        return "\n".join(lines)


class Client:
    """Requests over one kept connection, opened again when the server has closed it."""

    def __init__(self, path: Path | tuple[str, int]) -> None:
        self._path = path  # of a UNIX socket, or host and port
        self._connection: http.client.HTTPConnection | None = None

    def send(self, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        for attempt in range(2):
            connection = self._connection or self._open()
            try:
                connection.request(method, target, body, headers)
                response = connection.getresponse()
                answer = response.status, response.read()
            except (ConnectionError, http.client.RemoteDisconnected):
                self.close()
                if attempt:
                    raise
                continue
            if response.will_close:
                self.close()
            return answer
        raise AssertionError("unreachable")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> http.client.HTTPConnection:
        if isinstance(self._path, tuple):
            connection = http.client.HTTPConnection(*self._path, timeout=SECONDS)
        else:
            connection = http.client.HTTPConnection("agentd", timeout=SECONDS)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(SECONDS)
            connection.sock.connect(str(self._path))
        self._connection = connection
        return connection


def fuzz(path: Path, pids: dict[str, int], cases: int, number: int = 0, limit: float = 3600.0) -> Report:
    """Sends `cases` cases or some more to the admin socket at `path`, at most for `limit` seconds."""
    client, report = Client(path), Report()
    status, text = client.send("GET", "/openapi.json", None, {})
    assert status == 200, text
    schema = schemathesis.openapi.from_dict(json.loads(text))
    operations: list[Any] = [cast(Any, result).ok() for result in schema.get_all_operations()]
    began, turn = time.monotonic(), 0
    each = max(1, min(_EACH, cases // (5 * len(operations))))
    while report.cases < cases and time.monotonic() - began < limit:
        for operation in operations:
            for mode in _MODES:
                if time.monotonic() - began < limit:
                    _cases(client, operation, mode, each, number + turn, report)
        if turn == 0:
            report.before = sizes(pids)
        turn += 1
    report.seconds = time.monotonic() - began
    report.after = sizes(pids)
    for name, size in report.after.items():
        allowed = GROWTH if name.endswith("bytes") else 8
        if size > report.before[name] + allowed:
            report.problems.append(f"{name} grew from {report.before[name]} to {size}")
    client.close()
    return report


def hostile(
    path: Path, pids: dict[str, int], cases: int, number: int = 0, limit: float = 3600.0
) -> tuple[Attack, list[str]]:
    """What hostile constraints did to the daemon at `path`, and what must not be."""
    attack(lambda: Client(path), 24, number + 1)  # so that everything has been loaded
    before = sizes(pids)
    report = attack(lambda: Client(path), cases, number, limit)
    problems = list(report.problems)
    try:
        after = sizes(pids)
    except psutil.NoSuchProcess as error:
        return report, [*problems, f"a process is gone: {error}"]
    report.sizes = {name: (before[name], size) for name, size in after.items()}
    for name, size in after.items():
        if size > before[name] + (GROWTH if name.endswith("bytes") else 8):
            problems.append(f"{name} grew from {before[name]} to {size}")
    return report, problems


def sizes(pids: dict[str, int]) -> dict[str, int]:
    """Resident memory and descriptors of the processes."""
    values: dict[str, int] = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        values[f"{name} resident bytes"] = process.memory_info().rss
        values[f"{name} descriptors"] = process.num_fds()
    return values


def _cases(client: Client, operation: Any, mode: GenerationMode, n: int, number: int, report: Report) -> None:
    @seed(number)
    @settings(
        max_examples=n, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        _case(client, operation, mode, case, report)

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
        run()


def _case(client: Client, operation: Any, mode: GenerationMode, case: Any, report: Report) -> None:
    method, target, body, headers = wire_form(operation, case)
    report.cases += 1
    what = f"{mode.value}: {method} {target} {(body or b'')[:300]!r}"
    try:
        status, answer = client.send(method, target, body, headers)
    except (OSError, http.client.HTTPException) as error:
        report.problems.append(f"no answer ({type(error).__name__}: {error}): {what}")
        client.close()
        return
    report.statuses[status] += 1
    if status >= 500 and status not in (501, 503):
        report.problems.append(f"{status}: {what}: {answer[:300]!r}")
    if status >= 400 and not is_error(operation.path, answer):
        report.problems.append(f"{status} without an error's shape: {what}: {answer[:300]!r}")
    if mode is GenerationMode.NEGATIVE and status < 300 and operation.path not in _LENIENT and _forbidden(case):
        report.problems.append(f"{status} for what the schema forbids: {what}")


def wire_form(operation: Any, case: Any) -> tuple[str, str, bytes | None, dict[str, str]]:
    """The case as it goes over the wire; what would be answered at length, shorter."""
    if operation.method.upper() == "POST" and isinstance(case.body, dict) and operation.path in _ANSWERS:
        _shorten(operation.path, case.body)
    return _request(case)


def _shorten(path: str, body: dict[str, Any]) -> None:
    """Long answers would only cost time."""
    if path in _OLLAMA:
        options = body.get("options") or {}
        if isinstance(options, dict):
            body["options"] = {**options, "num_predict": _TOKENS}
        return
    limit = "max_output_tokens" if "responses" in path else "max_tokens"
    for name in (limit, "max_completion_tokens"):
        value = body.get(name)
        if name == limit or isinstance(value, int):
            body[name] = value if isinstance(value, int) and not isinstance(value, bool) and value <= 0 else _TOKENS


def _request(case: Any) -> tuple[str, str, bytes | None, dict[str, str]]:
    """The case as it goes over the wire."""
    sent = case.as_transport_kwargs(base_url="http://agentd")
    target = urlsplit(sent["url"]).path or "/"
    if query := sent.get("params"):
        target += "?" + urlencode(query, doseq=True)
    body: bytes | None = None
    if sent.get("json") is not None:
        body = json.dumps(sent["json"]).encode("utf-8", "surrogatepass")
    elif sent.get("data") is not None:
        data = sent["data"]
        body = data if isinstance(data, bytes) else str(data).encode("utf-8", "surrogatepass")
    names = ("content-type",)
    headers = {name: str(value) for name, value in sent["headers"].items() if name.lower() in names}
    return sent["method"], target, body, headers


def _forbidden(case: Any) -> bool:
    """Whether the schema's own word is that the body is wrong; types of texts in queries and paths are all texts."""
    meta = case.meta
    if meta is None:
        return False
    return any(
        location.value == "body" and info.mode is GenerationMode.NEGATIVE for location, info in meta.components.items()
    )


def is_error(path: str, answer: bytes) -> bool:
    """Whether it has the shape that errors have at this path."""
    try:
        error = json.loads(answer)["error"]
        if path.startswith("/api/"):
            return isinstance(error, str)
        return bool({"message", "type", "code"} <= error.keys())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def main() -> int:
    end_daemons_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument(
        "--hostile", type=int, default=0, metavar="N", help="send N hostile schemas and grammars instead"
    )
    parser.add_argument("--keys", type=int, default=0, metavar="N", help="try N times to get in over TCP instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--socket", type=Path, help="the admin socket of a daemon that may be broken")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="after which no more of --hostile or --keys are sent"
    )
    parser.add_argument(
        "--model", help="what the daemon that is started serves: a file or `default`; else a tiny model"
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.keys:
            from tools import intruders

            intrusion = intruders.run(options.keys, options.seed, options.seconds)
            print(intrusion.summary())
            return 1 if intrusion.problems else 0
        if options.socket is None:
            daemon = stack.enter_context(DaemonProcess(options.model))
            daemon.start()
            path, pids = daemon.admin, daemon.pids()
        else:
            path, pids = options.socket, {}
        if options.hostile:
            attacked, problems = hostile(path, pids, options.hostile, options.seed, options.seconds)
            print("\n".join([attacked.summary(), f"{len(problems)} problems", *problems]))
            return 1 if problems else 0
        report = fuzz(path, pids, options.cases, options.seed)
    print(report.summary())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
