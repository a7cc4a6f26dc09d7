"""Feedback: giving it, importing examples, reading it back."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from agentd.ctl import output
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import CtlError, UsageError
from agentd.ctl.options import Json, Limit, Offset, Socket, TaskFilter
from agentd.ctl.output import Column

app = typer.Typer(rich_markup_mode=None, help="Give feedback on answers, import examples, read both back.")

PAGE = 500  # rows fetched at a time by exports

_FEEDBACK = [
    Column("id", "id"),
    Column("created", "created_at"),
    Column("kind", "kind"),
    Column("task", "task"),
    Column("source", "source"),
    Column("author", "author"),
    Column("state", "state"),
    Column("inference", "inference_id"),
    Column("value", "value", wide=True),
]


@app.command()
def add(
    inference: Annotated[
        str | None, typer.Argument(metavar="INFERENCE", help="Id of the answer, or `last`.", show_default=False)
    ] = None,
    episode: Annotated[
        str | None, typer.Option(metavar="NAME", help="The episode that it is about as a whole, instead of an answer.")
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="TEXT", help="The right choice of the task.")] = None,
    demonstration: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What should have been said; `-` reads it from stdin.")
    ] = None,
    boolean: Annotated[
        str | None, typer.Option(metavar="yes|no", help="Whether it was good; a label where that leaves no doubt.")
    ] = None,
    score: Annotated[float | None, typer.Option("--float", metavar="X", help="How good the answer was.")] = None,
    chosen: Annotated[str | None, typer.Option(metavar="TEXT", help="An answer that is preferred to this one.")] = None,
    rejected: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chosen: preferred to this text instead.")
    ] = None,
    comment: Annotated[str | None, typer.Option(metavar="TEXT", help="A remark; it is kept, not trained on.")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="The task; the answer's own if left out.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A choice of a new task; once for each choice.")
    ] = None,
    source: Annotated[str, typer.Option(metavar="WHO", help="human, program or implicit.")] = "human",
    tag: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="A note to find it by; repeatable.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Idempotency key: sent twice, it is stored once.")
    ] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Say what was right or wrong about one answer, or how an episode came out."""
    if (inference is None) == (episode is None):
        raise UsageError("give the id of an answer, `last`, or --episode")
    if rejected is not None and chosen is None:
        raise UsageError("--rejected needs --chosen")
    preference = None if chosen is None else {"chosen": chosen} | ({} if rejected is None else {"rejected": rejected})
    kinds: JSON = {
        "label": label,
        "demonstration": sys.stdin.read() if demonstration == "-" else demonstration,
        "boolean": None if boolean is None else _boolean(boolean),
        "float": score,
        "preference": preference,
        "comment": comment,
    }
    values = {kind: value for kind, value in kinds.items() if value is not None}
    if len(values) != 1:
        raise UsageError("give exactly one of --label, --demonstration, --boolean, --float, --chosen, --comment")
    kind, value = values.popitem()
    optional: JSON = {"task": task, "choices": choice or None, "tags": _tags(tag or []) or None, "idempotency_key": key}
    daemon = Daemon(socket)
    about = {"episode": episode} if inference is None else {"inference_id": _inference(daemon, inference)}
    body: JSON = {**about, "kind": kind, "value": value, "source": source}
    answer = daemon.post("/v1/feedback", body | {name: value for name, value in optional.items() if value is not None})
    output.show(answer, as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A JSONL file of examples; `-` reads stdin.")],
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Import examples, all lines or none.

    A line is a JSON object with "task"; "messages", "prompt" or "text"; and "label" or "completion"; or a conversation
    of "messages" and "tools", as OpenAI's and TRL's files have it, in which the assistant's messages are the answers.
    """
    try:
        lines = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    try:
        answer = Daemon(socket).upload("/v1/examples", lines)
    except CtlError as error:
        error.args = (f"{file}: {error}",) if getattr(error, "code", "") == "invalid_line" else error.args
        raise
    output.show(answer, as_json)


@app.command("list")
def list_(
    limit: Limit = 20,
    offset: Offset = 0,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only feedback of this kind.")] = None,
    task: TaskFilter = None,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="accepted, duplicate, outweighed or quarantined.")
    ] = None,
    author: Annotated[str | None, typer.Option(metavar="WHO", help="Only of this user, such as uid:1000.")] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """The feedback that was given."""
    query = {"kind": kind, "task": task, "state": state, "author": author}
    answer = Daemon(socket).get("/admin/feedback", limit=limit, offset=offset, **query)
    output.document(answer) if as_json else output.listing(answer["feedback"], _FEEDBACK)


@app.command()
def export(
    examples: Annotated[
        bool, typer.Option("--examples", help="Examples instead, in the form that `feedback import` reads.")
    ] = False,
    task: TaskFilter = None,
    socket: Socket = None,
) -> None:
    """Write all feedback to stdout as JSONL, one object a line."""
    daemon = Daemon(socket)
    noun = "examples" if examples else "feedback"
    for row in _every(daemon, noun, task):
        print(json.dumps(_line(row) if examples else row, ensure_ascii=True))


def _every(daemon: Daemon, noun: str, task: str | None) -> Iterator[JSON]:
    """All rows of a list, page by page, each once even if new ones arrive at its head meanwhile."""
    seen: set[str] = set()
    offset = 0
    while True:
        page: list[JSON] = daemon.get(f"/admin/{noun}", limit=PAGE, offset=offset, task=task)[noun]
        yield from (row for row in page if row["id"] not in seen)
        seen.update(row["id"] for row in page)
        if not page:
            return
        offset += len(page)


def _line(example: JSON) -> JSON:
    """An example as `import` takes it, OpenAI's fine-tuning and TRL's trainers: a conversation whose last message is
    the answer, the ones before not to be learned; pairs and judged answers with the conversation as `prompt`."""
    kind, input, target = example["kind"], dict(example["input"]), example["target"]
    messages: list[JSON] | None = input.pop("messages", None)
    line: JSON = {"task": example["task"], **input}

    def said(answer: Any) -> Any:
        if messages is None:
            return answer
        return [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]

    if kind in ("preference", "thumb", "score"):
        judged = json.loads(target)
        line |= {} if messages is None else {"prompt": messages}
        if kind == "preference":
            return {**line, **{name: said(answer) for name, answer in judged.items()}}
        how = {"score": judged["score"]} if "score" in judged else {"label": judged["good"]}
        return {**line, "completion": said(judged["answer"]), **how}
    label = {"label": target} if kind == "label" else {}
    if messages is None:
        return {**line, **(label or {"completion": target})}
    before = [{**each, "weight": 0} if each["role"] == "assistant" else each for each in messages]
    return {**line, "messages": [*before, *said(json.loads(target) if kind == "message" else target)], **label}


def _inference(daemon: Daemon, identifier: str) -> str:
    if identifier != "last":
        return identifier
    latest = daemon.get("/admin/inferences", limit=1)["inferences"]
    if not latest:
        raise CtlError("nothing was answered yet; `agentctl ask` asks something")
    return str(latest[0]["id"])


def _boolean(value: str) -> bool:
    if value.lower() in ("yes", "true", "1"):
        return True
    if value.lower() in ("no", "false", "0"):
        return False
    raise UsageError(f"--boolean {value!r} is neither yes nor no")


def _tags(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair.lstrip("="):
            raise UsageError(f"--tag {pair!r} is not of the form NAME=TEXT")
    return dict(pair.split("=", 1) for pair in pairs)
