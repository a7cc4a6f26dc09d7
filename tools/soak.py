"""A long, rough day in a short time: `python -m tools.soak --seconds 1200 [--model MODEL.gguf]`.

Eight clients ask (streamed or not), hang up in the middle, send nonsense and give feedback, while passes run, revisions
are swapped and rolled back, and the engine and the trainer are killed at random. At the end it tells, and exits with 1
if not everything holds:

- every piece of feedback that was acknowledged is there;
- every answer is the one that the revision it names gives to that question;
- requests failed only on an engine that was killed while it worked on them;
- memory and descriptors are where they were.
"""

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from agentd.ctl.errors import ApiError, CtlError
from tools import reviews
from tools.daemon import DaemonProcess, UnixConnection, end_daemons_on_sigterm

CLIENTS = 8
QUESTIONS = ["Name a colour.", "What is two plus two?", "Write one sentence about the sea.", "Say something kind."]
MEMORY = 8 * 2**20  # bytes by which the daemon may have grown since the second third
DESCRIPTORS = 8
_TOKENS = 16
_PAUSE = 12  # times as long as a request took, a client waits before the next one
_SETTLE = 2.0  # seconds between a kill and the last request that may fail of it
_PASSES: tuple[dict[str, Any], ...] = (
    {"method": "mezo", "zo_steps": 4},
    {"method": "suffix-bp", "blocks": 1, "zo_steps": 0},
    {"method": "elasticzo", "blocks": 1, "zo_steps": 2},
)


@dataclass
class Findings:
    """What happened, shared by all threads."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    answers: dict[tuple[int, str], str] = field(default_factory=dict)
    kills: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # of passes that did not commit

    @property
    def passes(self) -> int:
        """How many came to a verdict; others ended with the engine or the trainer that was killed."""
        return sum(self.counts[f"passes {verdict}"] for verdict in ("committed", "rejected", "rolled_back"))

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def problem(self, text: str) -> None:
        with self.lock:
            self.problems.append(text)

    def answered(self, revision: int, question: str, text: str) -> None:
        """Greedy answers depend on nothing but the revision: the first one is what all others must be."""
        with self.lock:
            known = self.answers.setdefault((revision, question), text)
            if known != text:
                self.problems.append(f"revision {revision} answered {question!r} with {text!r}, before with {known!r}")
            self.counts["answers"] += 1

    def broke_off(self, began: float, error: str) -> None:
        """A request failed: only an engine that was killed while it worked may be the reason."""
        now = time.monotonic()
        with self.lock:
            excused = any(began - _SETTLE <= kill <= now for kill in self.kills)
            if excused:
                self.counts["broke off on a killed engine"] += 1
            else:
                self.problems.append(f"a request failed and nothing had been killed: {error}")


class Client(threading.Thread):
    def __init__(self, daemon: DaemonProcess, findings: Findings, seed: int, stopping: threading.Event) -> None:
        super().__init__(name=f"client {seed}", daemon=True)
        self._daemon, self._findings, self._stopping = daemon, findings, stopping
        self._random = random.Random(seed)
        self._number = seed
        self._given = 0

    def run(self) -> None:
        actions = [self._whole, self._stream, self._hang_up, self._nonsense, self._feedback]
        while not self._stopping.is_set():
            (action,) = self._random.choices(actions, [35, 25, 10, 10, 20])
            began = time.monotonic()
            try:
                action(began)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self._findings.problem(f"{self.name}, {action.__name__}: {type(error).__name__}: {error}")
            # Learning gives way to requests: without pauses between them there would be none.
            took = time.monotonic() - began
            self._stopping.wait(self._random.expovariate(1 / max(0.5, _PAUSE * took)))

    def _whole(self, began: float) -> None:
        question = self._random.choice(QUESTIONS)
        status, answer = self._post("/v1/chat/completions", _asking(question))
        if status == 200:
            self._findings.answered(answer["agentd"]["revision"], question, answer["choices"][0]["message"]["content"])
        else:
            self._failed(began, status, answer)

    def _stream(self, began: float) -> None:
        question, text, revision = self._random.choice(QUESTIONS), "", None
        for event in self._events({**_asking(question), "stream": True}):
            if "error" in event:
                self._failed(began, int(event.get("status", 503)), event)
                return
            text += event["choices"][0]["delta"].get("content") or ""
            revision = event["agentd"]["revision"]
        if revision is None:
            self._findings.problem("a stream without an event")
        else:
            self._findings.answered(revision, question, text)

    def _hang_up(self, began: float) -> None:
        body = {**_asking("Tell me a very long story."), "max_tokens": 400, "stream": True}
        for number, event in enumerate(self._events(body)):
            if "error" in event:
                self._failed(began, int(event.get("status", 503)), event)
                return
            if number >= self._random.randrange(1, 6):
                break
        self._findings.count("hung up")

    def _nonsense(self, began: float) -> None:
        body = self._random.choice(
            [
                b"{",
                b"[]",
                b'{"messages": []}',
                b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
                b"\xff",
            ]
        )
        status, answer = self._post("/v1/chat/completions", body)
        if status not in (400, 501) or "message" not in answer["error"]:
            self._findings.problem(f"nonsense was answered with {status}: {answer}")
        self._findings.count("refused")

    def _feedback(self, began: float) -> None:
        question = f"Was it good?\n\n{self.name} {self._given}"
        body = {**_asking(question), "max_tokens": 4, "metadata": {"task": "reviews"}}
        status, answer = self._post("/v1/chat/completions", body)
        if status != 200:
            self._failed(began, status, answer)
            return
        self._given += 1
        label = "no" if self._random.random() < 0.1 else "yes"
        key = f"{self.name}-{self._given}"
        label_body = {"inference_id": answer["id"], "kind": "label", "value": label, "idempotency_key": key}
        status, answer = self._post("/v1/feedback", label_body)
        if status == 201:
            with self._findings.lock:
                self._findings.acknowledged.append(answer["id"])
                self._findings.counts["feedback"] += 1
        else:
            self._findings.problem(f"feedback was answered with {status}: {answer}")

    def _failed(self, began: float, status: int, answer: dict[str, Any]) -> None:
        error = answer.get("error", {})
        if error.get("code") == "engine_died":
            self._findings.broke_off(began, str(error))
        else:
            self._findings.problem(f"{status}: {error}")

    def _post(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        answer = self._daemon.post(path, body)
        return answer.status, answer.json

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with closing(UnixConnection(self._daemon.api)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body).encode())
            response = connection.getresponse()
            if response.status != 200:
                yield {"status": response.status, **json.loads(response.read())}
                return
            with closing(response):
                while line := response.readline():
                    if line.startswith(b"data: {"):
                        yield json.loads(line[6:])


class Owner(threading.Thread):
    """Starts passes and goes back and forth between revisions."""

    def __init__(self, daemon: DaemonProcess, findings: Findings, seed: int, stopping: threading.Event) -> None:
        super().__init__(name="owner", daemon=True)
        self._daemon, self._findings, self._stopping = daemon, findings, stopping
        self._random = random.Random(seed)

    def run(self) -> None:
        turn = 0
        while not self._stopping.is_set():
            try:
                self._adapt(_PASSES[turn % len(_PASSES)])
                turn += 1
                self._go_somewhere()
            except ApiError as error:
                # The engine may be killed in the middle of it.
                if error.code not in ("engine_died", "engine_unavailable", "conflict"):
                    self._findings.problem(f"{self.name}: {error}")
            except CtlError as error:
                self._findings.problem(f"{self.name}: {error}")
            self._stopping.wait(0.5)

    def _adapt(self, options: dict[str, Any]) -> None:
        number = self._daemon.ctl.post("/admin/adapt", options)["pass"]
        while not self._stopping.wait(0.3):
            row = self._daemon.ctl.get(f"/admin/passes/{number}")["pass"]
            if row["finished_at"]:
                self._findings.count(f"passes {row['state']}")
                if row["reason"]:
                    self._findings.reasons[row["reason"]] += 1
                return

    def _go_somewhere(self) -> None:
        rows = self._daemon.ctl.get("/admin/revisions")["revisions"]
        there = [row["id"] for row in rows if row["state"] in ("base", "committed") and not row["serving"]]
        if there and not self._stopping.is_set():
            answer = self._daemon.ctl.post("/admin/rollback", {"revision": self._random.choice(there[-3:])})
            self._findings.count("swaps by the owner")
            if answer["swap_ms"] > 1000:
                self._findings.problem(f"a swap took {answer['swap_ms']:.0f} ms")


def kill_at_random(daemon: DaemonProcess, findings: Findings, seed: int, calm: threading.Event, every: float) -> None:
    """Ends the engine, then it or the trainer while there is one, every `every` seconds or so."""
    generator = random.Random(seed)
    while not calm.wait(generator.uniform(0.5, 1.5) * every):
        pids = daemon.pids()
        name = "trainer" if "trainer" in pids and findings.kills and generator.random() < 0.5 else "engine"
        if name in pids:
            if name == "engine":
                with findings.lock:
                    findings.kills.append(time.monotonic())
            with suppress(ProcessLookupError):
                os.kill(pids[name], signal.SIGKILL)
                findings.count(f"{name} killed")


def soak(daemon: DaemonProcess, seconds: float, *, seed: int = 0, every: float = 12.0, passes: int = 0) -> Findings:
    """Runs everything for `seconds`, then without kills until `passes` have come to a verdict (at most twenty times as
    long: only what never happens is a fault), and checks what is left."""
    findings, stopping, calm = Findings(), threading.Event(), threading.Event()
    process = psutil.Process(daemon.pids()["daemon"])
    descriptors = process.num_fds()
    threads: list[threading.Thread] = [Client(daemon, findings, number, stopping) for number in range(CLIENTS)]
    threads.append(Owner(daemon, findings, seed, stopping))
    killer = (daemon, findings, seed, calm, every)
    threads.append(threading.Thread(target=kill_at_random, args=killer, daemon=True))
    for thread in threads:
        thread.start()
    began = time.monotonic()
    while process.is_running():
        elapsed = time.monotonic() - began
        if elapsed >= seconds:
            calm.set()
            if findings.passes >= passes or elapsed >= 20 * seconds:
                break
        findings.memory.append(process.memory_info().rss)
        time.sleep(min(1.0, seconds / 60))
    calm.set()
    stopping.set()
    for thread in threads:
        thread.join(60)
        if thread.is_alive():
            findings.problem(f"{thread.name} hangs")
    _check(daemon, findings, process, descriptors)
    if findings.passes < passes:
        findings.problem(f"{findings.passes} passes came to a verdict, {passes} should have")
    return findings


def _check(daemon: DaemonProcess, findings: Findings, process: psutil.Process, descriptors: int) -> None:
    if daemon.process is None or daemon.process.poll() is not None:
        findings.problem(f"the daemon is gone:\n{daemon.log[-2000:]}")
        return
    with suppress(CtlError):
        daemon.ctl.post("/admin/cancel")
    stored: set[str] = set()
    while page := daemon.ctl.get("/admin/feedback", limit=1000, offset=len(stored))["feedback"]:
        stored |= {row["id"] for row in page}
    lost = [id for id in findings.acknowledged if id not in stored]
    if lost:
        findings.problem(f"{len(lost)} of {len(findings.acknowledged)} acknowledged pieces of feedback are lost")
    third = max(1, len(findings.memory) // 3)
    before, after = statistics.median(findings.memory[third : 2 * third]), statistics.median(findings.memory[-third:])
    if after > before + MEMORY:
        findings.problem(f"the daemon grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    time.sleep(1)
    if process.num_fds() > descriptors + DESCRIPTORS:
        findings.problem(f"the daemon has {process.num_fds()} descriptors, at the beginning it had {descriptors}")
    findings.counts["descriptors"], findings.counts["descriptors at the beginning"] = process.num_fds(), descriptors
    log = daemon.log
    if "Traceback" in log:
        findings.problem("a traceback in the log: " + log[log.index("Traceback") :][:2000])


def prepare(daemon: DaemonProcess, examples: list[dict[str, str]]) -> None:
    """Gives the daemon something to learn."""
    lines = "\n".join(json.dumps({"task": "reviews", **example}) for example in examples)
    daemon.ctl.upload("/v1/examples", lines.encode())


def settings(trial: float) -> dict[str, Any]:
    """Passes that are easily satisfied: it is the going back and forth that counts here."""
    return {
        "adapt": {
            "enabled": False,
            "gate": {
                "alpha": 0.4,
                "min_holdout": 5,
                "max_drift": 100,
                "max_skill_loss": 1,
                "max_regression": 0.5,
                "max_holdout": 60,
            },
            "trial": {"duration": trial, "max_latency": 1000},
            "max_examples": 160,
        },
        "memory": {"reserve": 0, "floor": 0},
        "serve": {"slots": 2},
    }


def made_up(n: int) -> list[dict[str, str]]:
    generator = random.Random(1)
    return [{"text": f"text {i}", "label": "no" if generator.random() < 0.1 else "yes"} for i in range(n)]


def summary(findings: Findings, seconds: float) -> str:
    pairs = {revision for revision, _ in findings.answers}
    distinct = len(set(findings.answers.values()))
    memory = [round(size / 2**20) for size in (findings.memory or [0])]
    lines = [f"{seconds:.0f} s: " + ", ".join(f"{name} {n}" for name, n in sorted(findings.counts.items()))]
    lines.append(f"{len(pairs)} revisions answered, with {distinct} different texts")
    lines.append(f"the daemon's memory: {memory[0]} MiB at first, {memory[-1]} at last, at most {max(memory)}")
    lines += [f"{n} × {reason}" for reason, n in findings.reasons.most_common(10)]
    lines.append(f"{len(findings.problems)} problems")
    return "\n".join([*lines, *findings.problems[:20]])


def _asking(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": _TOKENS, "temperature": 0, "seed": 0}


def main() -> int:
    end_daemons_on_sigterm()
    parser = argparse.ArgumentParser(description="A long, rough day in a short time.")
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--passes", type=int, default=5, help="that must have come to a verdict")
    parser.add_argument("--model", type=Path, help="a GGUF file; a tiny model if left out")
    parser.add_argument("--every", type=float, help="seconds between two kills; 120, or 12 for the tiny model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with DaemonProcess(options.model, settings(trial=3)) as daemon:
        daemon.start()
        prepare(daemon, reviews.liked("train")[:240] if options.model else made_up(120))
        every = options.every or (120 if options.model else 12)
        findings = soak(daemon, options.seconds, seed=options.seed, every=every, passes=options.passes)
    print(summary(findings, options.seconds))
    if options.json:
        figures = {"seconds": options.seconds, "counts": findings.counts, "problems": findings.problems}
        figures["reasons"] = findings.reasons
        options.json.write_text(json.dumps({**figures, "memory": findings.memory}, indent=1))
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
