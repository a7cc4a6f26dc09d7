"""How accuracy over time is drawn."""

from typing import Any

from agentd.ctl import accuracy


def day(revision: int, n: int, right: int, day: str = "2026-01-31") -> dict[str, Any]:
    return {"day": day, "revision": revision, "n": n, "right": right}


def test_days_of_few_answers_are_taken_together_but_not_over_a_revision() -> None:
    days = [day(0, 4, 2), day(0, 8, 4), day(0, 3, 3), day(1, 20, 18)]
    assert accuracy.shares(days) == [(0, 12, 6), (0, 3, 3), (1, 20, 18)]


def test_overall_and_latest() -> None:
    days = [day(0, 20, 5), day(1, 20, 15)]
    assert accuracy.overall(days) == {"answers": 40, "accuracy": 0.5, "latest": 0.75}
    assert accuracy.overall([]) == {"answers": 0, "accuracy": None, "latest": None}


def test_revisions_are_marked_where_their_answers_begin() -> None:
    lines = accuracy.curve([day(0, 20, 5), day(0, 20, 5), day(2, 20, 20), day(11, 20, 20)])
    assert len(lines) == 5
    assert lines[0].startswith("1 ┤")
    assert lines[3].startswith("0 ┤")
    marks = lines[-1]
    assert [marks.index(mark) - 3 for mark in ("r0", "r2", "r11")] == [0, 39, 59]
    assert "⡇" not in lines[0][:20], "a quarter is right there, not all"
    assert accuracy.curve([]) == []


def test_marks_that_would_meet_are_left_out() -> None:
    days = [day(revision, 20, 10) for revision in range(100)]
    marks = accuracy.curve(days)[-1].split()
    assert marks[0] == "r0"
    assert 10 < len(marks) < 40
