"""That nothing has changed which was not meant to; see this package's own text."""

from pathlib import Path

import pytest

from .comparison import differences, recorded
from .record import SECTIONS, measure


@pytest.mark.parametrize("section", SECTIONS)
def test_what_was_recorded_is_what_there_is(section: str, tmp_path: Path) -> None:
    lines = differences(measure(section, tmp_path), recorded()[section], section)
    assert not lines, "\n".join(lines[:40])


def test_a_difference_is_found() -> None:
    tree = {"a": [1, 2.0, "x"], "b": {"c": None, "d": True}}
    assert differences(tree, tree) == []
    assert differences({"x": 1.00001}, {"x": 1.0}) == []
    for other in (
        {"a": [1, 2.001, "x"], "b": {"c": None, "d": True}},
        {"a": [1, 2.0, "y"], "b": {"c": None, "d": True}},
        {"a": [1, 2.0], "b": {"c": None, "d": True}},
        {"a": [1, 2, "x"], "b": {"c": None, "d": True}},
        {"a": [1, 2.0, "x"], "b": {"c": 0.0, "d": True}},
        {"a": [1, 2.0, "x"], "b": {"c": None}},
        {"a": [1, 2.0, "x"], "b": {"c": None, "d": True, "e": 1}},
    ):
        assert len(differences(tree, other)) == 1
