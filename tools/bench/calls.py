"""Calls of tools: how many are valid and right (Berkeley Function Calling Leaderboard), what masks cost, and how soon a
prompt with tools is answered.

The questions come with bfcl-eval (Apache-2.0), which is downloaded once and not installed. Valid is a call of a
declared function with arguments of its schema; right is one that the leaderboard's answers allow.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs

from agentd import models
from agentd.config import paths
from tools.daemon import DaemonProcess, UnixConnection, streaming

PARTS = ("required", "auto", "masks", "first-token")
KINDS = ("simple_python", "multiple")
_CLIENTS = 4
_PATIENCE = 600.0  # seconds for an answer, on machines that others use as well
CHAT = "/v1/chat/completions"
REQUIREMENT = "bfcl-eval==2026.3.23"
TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=50, help="of each kind (there are 400 and 200)")
    parser.add_argument("--first", type=int, default=0, help="how many questions of each kind to pass over")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of %(default)s")
    parser.add_argument("--model", help="a GGUF file; else the default model")
    parser.add_argument("--context", type=int, default=8192, help="tokens")
    parser.add_argument("--threads", type=int, help="of the engine; else what the machine has")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    kinds = arguments.kinds.split(",")
    for option, named, known in (("--parts", parts, PARTS), ("--kinds", kinds, KINDS)):
        if unknown := set(named) - set(known):
            parser.error(f"{option}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    model = Path(arguments.model) if arguments.model else models.fetch_default()
    threads = arguments.threads or "auto"
    with DaemonProcess(model, {"model": {"context": arguments.context, "threads": threads}}) as daemon:
        daemon.start()
        for choice in ("required", "auto"):
            if choice in parts:
                for kind in kinds:
                    print(leaderboard(daemon, kind, choice, arguments.first, arguments.questions), flush=True)
        if "masks" in parts:
            for n in (1, 20, 100):
                print(masks(daemon, n), flush=True)
        if "first-token" in parts:
            print(first_token(daemon, 20), flush=True)
    return 0


def questions(kind: str) -> Iterator[tuple[list[Any], list[dict[str, Any]], dict[str, Any]]]:
    """(messages, tools, the right arguments by function) of every question."""
    folder = paths.cache_dir() / "bfcl"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            subprocess.run([*command, scratch, REQUIREMENT], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            wheel.rename(folder / wheel.name)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"bfcl_eval/data/BFCL_v4_{kind}.json").decode().splitlines()
        right = archive.read(f"bfcl_eval/data/possible_answer/BFCL_v4_{kind}.json").decode().splitlines()
    answers = {line["id"]: line["ground_truth"][0] for line in map(json.loads, right)}
    for line in map(json.loads, lines):
        tools = [
            {"type": "function", "function": {**function, "parameters": as_schema(function["parameters"])}}
            for function in line["function"]
        ]
        yield line["question"][0], tools, answers[line["id"]]


def as_schema(tree: Any) -> Any:
    """The leaderboard's parameters as a JSON schema."""
    if isinstance(tree, list):
        return [as_schema(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    schema = {key: as_schema(value) for key, value in tree.items() if key not in ("default", "optional")}
    if isinstance(kind := schema.get("type"), str):
        schema["type"] = TYPES.get(kind, kind)
        if kind == "any":
            del schema["type"]
    return schema


@dataclass(frozen=True)
class Outcome:
    """`opened`: a call was begun; `whole`: and ended before max_tokens did."""

    opened: bool
    whole: bool
    valid: bool
    right: bool


def leaderboard(daemon: DaemonProcess, kind: str, choice: str, first: int, n: int) -> str:
    """`n` questions from the one numbered `first` on, `_CLIENTS` at a time: how many are valid and right is looked at
    here, not how fast."""
    asked = list(itertools.islice(questions(kind), first, first + n))
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for outcome in clients.map(lambda question: called(daemon, choice, *question), asked):
            outcomes.append(outcome)
            if len(outcomes) % 50 == 0:
                print(f"{kind}, {choice}: {len(outcomes)} asked", file=sys.stderr, flush=True)
    opened, whole, valid, right = (
        sum(getattr(outcome, name) for outcome in outcomes) for name in ("opened", "whole", "valid", "right")
    )
    cut = opened - whole
    return (
        f"{kind}, {choice}: {len(asked)} asked, {opened} calls, {cut} cut by max_tokens, {valid} valid, {right} right"
    )


def called(
    daemon: DaemonProcess, choice: str, messages: list[Any], tools: list[dict[str, Any]], answer: dict[str, Any]
) -> Outcome:
    body = {
        "messages": messages,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 512 if choice == "required" else 128,
    }
    with contextlib.closing(UnixConnection(daemon.api, timeout=_PATIENCE)) as connection:
        got = connection.answer("POST", CHAT, json.dumps(body).encode())
    assert got.status == 200, got.body[:300]
    chosen = got.json["choices"][0]
    calls, whole = chosen["message"].get("tool_calls") or [], chosen["finish_reason"] == "tool_calls"
    if not calls or not whole:
        return Outcome(bool(calls), whole, valid=False, right=False)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    name, arguments = calls[0]["function"]["name"], json.loads(calls[0]["function"]["arguments"])
    valid = name in schemas and bool(jsonschema_rs.is_valid(schemas[name], arguments))
    return Outcome(True, True, valid, right=name in answer and matches(arguments, answer[name]))


def matches(arguments: dict[str, Any], allowed: dict[str, list[Any]]) -> bool:
    def plain(value: Any) -> Any:
        return value.lower().replace(" ", "") if isinstance(value, str) else value

    return arguments.keys() <= allowed.keys() and all(
        ("" in values if key not in arguments else plain(arguments[key]) in [plain(value) for value in values])
        for key, values in allowed.items()
    )


def made_tools(n: int) -> list[dict[str, Any]]:
    properties = {"room": {"type": "string"}, "level": {"type": "integer", "minimum": 0, "maximum": 100}}
    parameters = {"type": "object", "properties": properties, "required": ["room", "level"]}
    return [
        {
            "type": "function",
            "function": {"name": f"tool_{i}", "description": f"Sets lamp {i}.", "parameters": parameters},
        }
        for i in range(n)
    ]


def timed(daemon: DaemonProcess, text: str, **fields: Any) -> tuple[float, float, int]:
    """(seconds to the first chunk, seconds a token after it, tokens)."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 96, **fields}
    start, first, tokens = time.perf_counter(), 0.0, 0
    with streaming(daemon.api, CHAT, {**body, "stream_options": {"include_usage": True}}) as events:
        for event in events:
            first = first or time.perf_counter()
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return first - start, (time.perf_counter() - first) / max(1, tokens - 1), tokens


def masks(daemon: DaemonProcess, n: int) -> str:
    """The same prompt answered freely and constrained, taking turns; its prompt is cached."""
    tools, free, held = made_tools(n), [], []
    for i in range(6):
        question = f"Set lamp {i % n} to {i + 10} in the kitchen and tell me all about it."
        free.append(timed(daemon, question, tools=tools, tool_choice="auto")[1])
        held.append(timed(daemon, question, tools=tools, tool_choice="required")[1])
    a, b = statistics.median(free), statistics.median(held)
    return f"{n} tools: {1e3 * a:.2f} ms a token free, {1e3 * b:.2f} ms constrained ({b / a - 1:+.0%})"


def first_token(daemon: DaemonProcess, n: int) -> str:
    tools = made_tools(n)
    tools[0]["function"]["description"] = "No prompt before began like this."
    cold = timed(daemon, "Hello.", tools=tools)[0]
    warm = [timed(daemon, f"Hello, number {i}.", tools=tools)[0] for i in range(5)]
    return (
        f"{n} tools, first token: {1e3 * cold:.0f} ms cold, {1e3 * statistics.median(warm):.0f} ms with a cached prefix"
    )


if __name__ == "__main__":
    sys.exit(main())
