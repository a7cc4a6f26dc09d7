"""Averaging numbers along shared directions, and what one bad board in five can do to that."""

import numpy as np
import pytest
from agentd_flower import aggregate, ledgers
from agentd_flower.ledgers import BOTTOM, Pool
from agentd_flower.wire import Unusable

DICE = np.random.default_rng(1)
TRUE = DICE.standard_normal(64)
HONEST = [TRUE + 0.5 * DICE.standard_normal(64) for _ in range(4)]
MEAN = np.mean(HONEST, axis=0)


def along(moved: list[float]) -> float:
    """The cosine with where all honest boards together go."""
    return float(np.dot(moved, MEAN) / np.linalg.norm(moved) / np.linalg.norm(MEAN))


def averaged(bad: np.ndarray, robust: str = "trimmed") -> list[float]:
    return ledgers.averaged([list(each) for each in [*HONEST, bad]], [10] * 5, robust, 0.2)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(-MEAN, id="flipped signs"),
        pytest.param(-1000 * MEAN, id="flipped signs, a thousand times as long"),
        pytest.param(100 * DICE.standard_normal(64), id="garbage"),
        pytest.param(np.zeros(64), id="nothing"),
    ],
)
def test_one_of_five_boards_does_not_turn_the_fleet(bad: np.ndarray) -> None:
    assert along(averaged(bad)) > 0.9
    assert np.linalg.norm(averaged(bad)) < 1.2 * np.linalg.norm(MEAN)


def test_a_plain_mean_would_be_turned() -> None:
    """What is held against: without the bound on norms one board decides."""
    rows = np.stack([*HONEST, -1000 * MEAN])
    assert along(list(rows.mean(axis=0))) < -0.99


def test_weights_are_numbers_of_examples() -> None:
    moved = ledgers.averaged([[1.0, 0.0], [0.0, 1.0]], [30, 10], "mean", 0.2)
    assert moved == pytest.approx([0.75, 0.25])
    assert ledgers.averaged([[1.0, 0.0], [0.0, 1.0]], [30, None], "mean", 0.2) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("n", "k"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (10, 2), (100, 20)])
def test_how_many_are_left_out(n: int, k: int) -> None:
    assert aggregate.trimmed_count(n, 0.2) == k


def test_rounds_go_through_the_pool_and_come_again() -> None:
    pool = Pool(128, 32)
    assert [pool.first(number) - BOTTOM for number in range(1, 7)] == [0, 32, 64, 96, 0, 32]
    total: dict[int, float] = {}
    for number in range(1, 101):
        total = ledgers.added(total, pool.first(number), [0.5] * 32)
    assert len(total) == 128  # a hundred rounds, and a board that was away replays no more than this
    assert sum(total.values()) == pytest.approx(0.5 * 32 * 100)


@pytest.mark.parametrize(("size", "width"), [(100, 32), (16, 32), (32, 4)])
def test_a_pool_is_a_multiple_of_a_round(size: int, width: int) -> None:
    with pytest.raises(ValueError, match="no multiple"):
        Pool(size, width)


def test_a_replay_of_an_earlier_round_is_refused() -> None:
    pool = Pool(128, 32)
    old = {pool.first(1) + place: 0.1 for place in range(32)}
    assert ledgers.vector(old, pool.first(1), 32) == pytest.approx([0.1] * 32)
    with pytest.raises(Unusable, match="none of this round's"):
        ledgers.vector(old, pool.first(2), 32)


@pytest.mark.parametrize("value", [1e30, 1e5])
def test_what_is_far_too_long_is_refused(value: float) -> None:
    with pytest.raises(Unusable, match="far too long"):
        ledgers.vector({BOTTOM: value}, BOTTOM, 32)
