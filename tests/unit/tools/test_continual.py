"""The simulated life: its tasks say what is right and what is wrong, and its report what was measured."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tools.bench.continual import _drifted
from tools.bench.continual_report import plot, table
from tools.bench.continual_tasks import NAMES, LifeTask, tasks

HERE = [name for name in NAMES if name != "sarcasm"]


def message(right: Any) -> dict[str, Any]:
    return right if isinstance(right, dict) else {"role": "assistant", "content": right}


@pytest.mark.parametrize("name", HERE)
def test_the_right_answer_is_right_and_a_mistake_is_not(name: str) -> None:
    (task,) = tasks([name], 0, None)
    assert len(task.train) >= 300
    assert len(task.held) >= 100
    draw = random.Random(0)
    for row in task.train[:20]:
        assert task.is_right(row, message(task.right(row)))
        assert not task.is_right(row, message(task.wrong(row, draw)))
        line = json.loads(task.line(row))
        assert line["messages"][0] == task.request(row)["messages"][0]
        assert task.feedback("i", task.right(row))["kind"] == ("label" if task.choices else "demonstration")


def test_seeds_say_the_order_and_nothing_else() -> None:
    a, b, again = (tasks(["intents"], seed, None)[0] for seed in (0, 1, 0))
    assert a == again
    assert a.train != b.train
    assert sorted(map(json.dumps, a.train)) == sorted(map(json.dumps, b.train))


def test_a_task_that_drifts_means_something_else_by_every_label() -> None:
    (task,) = tasks(["reviews"], 0, None)
    drifted: LifeTask = _drifted(task)
    assert all({task.right(row), drifted.right(row)} == {"yes", "no"} for row in task.train[:10])


def test_headlines_need_their_file() -> None:
    with pytest.raises(ValueError, match="--sarcasm FILE"):
        tasks(["sarcasm"], 0, None)


def night(*states: str) -> dict[str, Any]:
    return {"seconds": 5.0, "over": True, "passes": [{"state": state} for state in states]}


ROWS: list[dict[str, Any]] = [
    {"part": "first", "seed": 0, "task": "a", "corrections": 5, "column": "base", "right": 0.5, "ms": 10.0},
    {"part": "first", "seed": 0, "task": "a", "corrections": 5, "column": "recall", "right": 0.75, "ms": 20.0},
    {"part": "first", "seed": 0, "task": "a", "corrections": 10, "column": "recall", "right": 1.0, "ms": 30.0},
    {"part": "tasks", "seed": 0, "order": ["a", "b"], "after": None, "right": {"a": 0.5, "b": 0.5}},
    {"part": "tasks", "seed": 0, "order": ["a", "b"], "after": "a", "right": {"a": 0.9, "b": 0.5}},
    {"part": "tasks", "seed": 0, "order": ["a", "b"], "after": "b", "right": {"a": 0.8, "b": 0.7}},
    {"part": "tasks", "seed": 0, "order": "joint", "after": "joint", "right": {"a": 0.9, "b": 0.8}},
    *(
        {
            "part": "days",
            "seed": 0,
            "day": day,
            "drift": 4,
            "end": 6,
            "right": {"a": day / 20, **({"b": 1.0} if day < 6 else {})},
            "night": night("committed") if day == 3 else night(),
            "memory_bytes": 10**8,
            "disk_bytes": 10**6 * (1 + day),
        }
        for day in range(20)
    ),
]


def test_the_report_has_a_table_for_every_part() -> None:
    text = table(ROWS)
    assert "| a | 5 | 50.0 %, 10 ms | 75.0 %, 20 ms |" in text
    assert "| a | 10 | – | 100.0 %, 30 ms |" in text
    assert "| a → b | 0 | 75.0 % | -10.0 points |" in text
    assert "| joint | 0 | 85.0 % | – |" in text
    assert "| a | 22.5% | 72.5% | 72.5% |" in text
    assert "Passes: 1 committed. Longest night: 5 s." in text
    assert "1.0 MB after the first day, 20.0 MB after the last" in text


def test_the_picture_has_a_panel_for_every_part(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(ROWS, tmp_path / "life.png")
    assert (tmp_path / "life.png").read_bytes().startswith(b"\x89PNG")
