"""Inferences: what was asked and answered, and asking something."""

import sys
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import JSON, Daemon, segment
from agentd.ctl.options import Json, Limit, Socket
from agentd.ctl.output import Column

_INFERENCES = [
    Column("id", "id"),
    Column("created", "created_at"),
    Column("revision", "revision", right=True),
    Column("task", "task"),
    Column("episode", "episode"),
    Column("tokens", "completion_tokens", right=True),
    Column("first token", "ttft_ms", right=True),
    Column("total", "latency_ms", right=True),
    Column("input", "input", wide=True),
    Column("output", "output", wide=True),
]


def inferences(
    identifier: Annotated[str | None, typer.Argument(metavar="ID", help="Show this one in full.")] = None,
    episode: Annotated[str | None, typer.Option(metavar="NAME", help="Only the steps of this episode.")] = None,
    limit: Limit = 20,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """What was answered, by which revision, how fast."""
    daemon = Daemon(socket)
    if identifier is not None:
        answer = daemon.get(f"/admin/inferences/{segment(identifier)}")
        output.show(answer, as_json)
        return
    answer = daemon.get("/admin/inferences", limit=limit, episode=episode)
    rows = [_readable(row) for row in answer["inferences"]]
    output.document(answer) if as_json else output.listing(rows, _INFERENCES)


def _readable(row: JSON) -> JSON:
    """On a terminal, the input as what the user said last; a pipe gets it whole."""
    if not output.on_terminal():
        return row
    messages = row["input"].get("messages")
    text = messages[-1].get("content") if messages else row["input"].get("prompt")
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in row.get("tool_calls") or ()]
    return row | {"input": text, "output": " ".join([row["output"], *calls]).strip()}


def ask(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to say; `-` reads it from stdin.")],
    task: Annotated[str | None, typer.Option(metavar="NAME", help="The task this belongs to, for feedback.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Length limit.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, metavar="T", help="0 for greedy decoding.")] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Ask the model something.

    The answer goes to stdout; the revision that gave it and its id, for feedback, to stderr.
    """
    daemon = Daemon(socket, timeout=600)
    said = sys.stdin.read() if text == "-" else text
    body: JSON = {"messages": [{"role": "user", "content": said}]}
    body |= {} if max_tokens is None else {"max_tokens": max_tokens}
    body |= {} if temperature is None else {"temperature": temperature}
    body |= {} if task is None else {"metadata": {"task": task}}
    body["model"] = daemon.get("/health")["model"]
    if as_json:
        output.document(daemon.post("/v1/chat/completions", body))
        return
    chunk: JSON = {}
    for chunk in daemon.stream("/v1/chat/completions", body | {"stream": True}):
        for choice in chunk.get("choices", []):
            piece = choice.get("delta", {}).get("content") or ""
            sys.stdout.write(output.clean(piece) if output.on_terminal() else piece)
            sys.stdout.flush()
    print()
    revision, identifier = output.pick(chunk, "agentd.revision"), chunk.get("id")
    if output.pick(chunk, "agentd.recorded") is False:
        output.say(f"revision {revision}; not recorded, see the daemon's log: it cannot get feedback")
        return
    kind = "--demonstration" if task is None else "--label"
    output.say(f"revision {revision}, id {identifier}; correct it: `agentctl feedback add {identifier} {kind} …`")
