"""Rows that the tests of the store have in common."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.store import inferences, revisions
from agentd.store.inferences import Inference


def inference(text: str = "a fine film", **changes: Any) -> Inference:
    sample = Inference(
        id=ids.uuid7(),
        created_at=ids.now(),
        revision=0,
        kind="chat",
        task=None,
        input={"messages": [{"role": "user", "content": text}]},
        output="It was great.",
        params={"temperature": 0.0},
        finish_reason="stop",
        prompt_tokens=12,
        completion_tokens=5,
        ttft_ms=20.5,
        latency_ms=81.25,
    )
    return replace(sample, **changes)


def recorded(db: Database, /, text: str = "a fine film", **changes: Any) -> str:
    """Records an inference and returns its id."""
    sample = inference(text, **changes)
    inferences.record(db, sample)
    return sample.id


def revision(id: int, parent: int = 0, pass_id: int | None = None, **changes: Any) -> revisions.Revision:
    sample = revisions.Revision(id, parent, pass_id, ids.now(), "staged", None, "suffix-bp", 1, "0" * 64, {})
    return replace(sample, **changes)


def database_of_nine_steps(path: Path) -> Path:
    """The empty database of an agentd whose schema came about in nine migrations, as it left it."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(Path(__file__).with_name("nine_steps.sql").read_text())
    return path
