"""tools/bench/keys.py looks every kind of key up equally often, and its statistic is what it says."""

import pytest

from tools.bench import keys


def test_every_kind_is_looked_up_as_often() -> None:
    times = keys.measure(3, 4)
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys(times, 4)
    assert len(times) == 5


@pytest.mark.parametrize(
    ("times", "than", "share"), [([1, 2], [1, 2], 0.5), ([3], [1, 2], 1.0), ([0], [1, 2], 0.0), ([1, 3], [1, 2], 0.625)]
)
def test_the_share_of_longer_looks(times: list[int], than: list[int], share: float) -> None:
    assert keys.slower(times, than) == share
