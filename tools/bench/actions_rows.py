"""What `actions` learns from and how it judges: rows, the tokens that the daemon makes of them, and its answers."""

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd.adapt.planning.dataset import Dataset, Member
from agentd.ctl.client import Daemon
from agentd.engine.operations import Encode, Open
from agentd.engine.process.activity import Activity
from agentd.store import examples, tasks
from tools import home
from tools.bench.parts import supervisor
from tools.daemon import DaemonProcess, ToolFailed

_AT_ONCE = 4  # the daemon's slots
_MAX_TOKENS = 64
_TIMEOUT = 600.0  # seconds
_ALL = 10**6
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Judgement:
    """Shares: of commands answered by the right call and nothing else, of talk answered by a call. `mistakes` are some
    commands with what was called."""

    exact: float
    named: float
    called: float
    mistakes: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def sample(commands: int, talk: int, seed: int) -> list[dict[str, Any]]:
    """Training rows; seed 0 has the first ones, others a sample. Raises ToolFailed where there are fewer."""
    rows: list[dict[str, Any]] = []
    for n, pool in ((commands, home.commands("train")), (talk, home.chat("train"))):
        if n > len(pool) and pool[0].keys() & {"name"}:
            raise ToolFailed(f"there are {len(pool)} commands to learn from, not {n}")
        rows += (random.Random(seed).sample(pool, len(pool)) if seed else pool)[:n]
    return rows


def poisoned(rows: Sequence[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """The rows with the calls of a share of the commands wrong: each has that of another command, which differs."""
    commands = [row for row in rows if "name" in row]
    chance = random.Random(f"{seed} wrong")
    wrong = {id(row) for row in chance.sample(commands, round(share * len(commands)))}
    poisoned: list[dict[str, Any]] = []
    for row in rows:
        if id(row) in wrong:
            calls = [{name: each[name] for name in ("name", "arguments")} for each in commands]
            others = [call for call in calls if any(call[name] != row[name] for name in call)]
            row = row | chance.choice(others) if others else row
        poisoned.append(row)
    return poisoned


def encoded(model: Path, state: Path, target: Path) -> None:
    """Writes the tokens of all examples in a daemon's state as its passes have them (agentd.learn.encoded), but
    for the model's own answers that a pass adds."""
    uri = f"{(state / 'agentd.db').as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        db = Database(connection)
        known = {task.name: task for task in tasks.all(db)}
        stored = sorted(examples.list_(db, _ALL), key=lambda example: example.id)
        members = [Member(i, example, "train", known[example.task]) for i, example in enumerate(stored)]
    source = target.with_suffix(".source")
    Dataset(members, {}).write(source)
    asyncio.run(_encode(model, source, target))


async def _encode(model: Path, source: Path, target: Path) -> None:
    engine = supervisor(model, Activity())
    await engine.start()
    try:
        await engine.call(Open())
        await engine.call(Encode(source, target))
    finally:
        await engine.stop()


def judge(daemon: DaemonProcess, limit: int | None) -> Judgement:
    """Answers to the held-out commands and talk; `limit` of each. Raises CtlError."""
    commands, talk = home.commands("heldout")[:limit], home.chat("heldout")[:limit]
    calls = answers(daemon, [row["text"] for row in commands], "required")
    free = answers(daemon, [row["text"] for row in talk], "auto")
    pairs = list(zip(commands, calls, strict=True))
    mistakes = [
        {
            "text": row["text"],
            "right": [row["name"], row["arguments"]],
            "called": [call["function"] for call in answer_calls],
        }
        for row, answer_calls in pairs
        if not home.is_right(row, answer_calls)
    ]
    return Judgement(
        exact=1 - len(mistakes) / len(commands),
        named=sum([call["function"]["name"] for call in answer_calls] == [row["name"]] for row, answer_calls in pairs)
        / len(commands),
        called=sum(map(bool, free)) / len(talk),
        mistakes=mistakes[:10],
    )


def answers(daemon: DaemonProcess, texts: Sequence[str], choice: str) -> list[list[dict[str, Any]]]:
    """The tool calls that each text is answered with. Raises CtlError."""
    client = Daemon(daemon.api, timeout=_TIMEOUT)

    def ask(text: str) -> list[dict[str, Any]]:
        body = {
            "messages": [{"role": "user", "content": text}],
            "tools": home.TOOLS,
            "tool_choice": choice,
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        calls: list[dict[str, Any]] = client.post(CHAT, body)["choices"][0]["message"].get("tool_calls") or []
        return calls

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [*map(ask, texts[:1]), *pool.map(ask, texts[1:])]  # the tools' tokens are computed once
