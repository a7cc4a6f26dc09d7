import random
from fractions import Fraction

import pytest

from agentd.learn.significance import mcnemar, paired_permutation, welch


def answers(won: int, lost: int, both: int = 0, neither: int = 0) -> tuple[list[bool], list[bool]]:
    before = [False] * won + [True] * lost + [True] * both + [False] * neither
    after = [True] * won + [False] * lost + [True] * both + [False] * neither
    return before, after


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, Fraction(1, 2)),
        (1, 0, Fraction(1, 4)),  # P(X = 1) / 2
        (0, 1, Fraction(3, 4)),  # P(X = 1) + P(X = 0) / 2
        (5, 0, Fraction(1, 64)),
        (3, 1, Fraction(1, 16) + Fraction(4, 32)),  # P(X = 4) + P(X = 3) / 2 of Binomial(4, 1/2)
        (8, 2, Fraction(1 + 10, 1024) + Fraction(45, 2048)),
    ],
)
def test_mcnemar_against_binomials_by_hand(won: int, lost: int, p: Fraction) -> None:
    assert mcnemar(*answers(won, lost)) == pytest.approx(float(p), rel=1e-15)
    assert mcnemar(*answers(won, lost, both=50, neither=20)) == mcnemar(*answers(won, lost))


def test_mcnemar_is_symmetric() -> None:
    for won, lost in [(0, 3), (7, 7), (30, 12), (200, 180)]:
        assert mcnemar(*answers(won, lost)) + mcnemar(*answers(lost, won)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.slow
def test_mcnemar_takes_large_holdouts() -> None:
    assert 0 < mcnemar(*answers(3000, 2000, both=5000)) < 1e-12


def test_permutation_by_hand() -> None:
    # gains 1, 2, 3, -1: of the 16 signed sums of (1, 2, 3, 1), those >= 5 are 7, 5, 5
    assert paired_permutation([1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0], seed=0) == 3 / 16
    # ties in floating point: every one of these sums that equals the observed one must count
    assert paired_permutation([0.1, 0.2, 0.3], [0.0, 0.0, 0.0], seed=0) == 1 / 8
    assert paired_permutation([0.5, 0.5], [0.5, 0.5], seed=0) == 1.0
    assert paired_permutation([0.0] * 3, [0.1, 0.2, 0.3], seed=0) == 1.0


def test_sampled_permutation_agrees_with_exact() -> None:
    generator = random.Random(5)
    before = [generator.gauss(0.35, 1) for _ in range(14)]
    after = [0.0] * 14
    exact = paired_permutation(before, after, seed=0)
    # A fifteenth pair that hardly matters makes the test draw its flips.
    sampled = paired_permutation([*before, 1e-9], [*after, 0.0], seed=0)
    assert 0.02 < exact < 0.5
    assert sampled == pytest.approx(exact, abs=5 * (exact / 9999) ** 0.5)


def test_permutation_is_deterministic() -> None:
    generator = random.Random(6)
    before, after = ([generator.random() for _ in range(100)] for _ in range(2))
    assert paired_permutation(before, after, seed=3) == paired_permutation(before, after, seed=3)
    assert paired_permutation(before, after, seed=3) != paired_permutation(before, after, seed=4)


def test_false_positives_stay_near_alpha() -> None:
    """Under the null, 5 % of candidates pass at alpha 0.05: McNemar on answers, the permutation on losses."""
    generator = random.Random(11)
    alpha, runs = 0.05, 2000
    passed = 0
    for _ in range(runs):
        before, after = ([generator.random() < 0.7 for _ in range(64)] for _ in range(2))
        passed += mcnemar(before, after) <= alpha
    assert 0.035 < passed / runs < 0.065
    runs, passed = 1000, 0
    for _ in range(runs):
        losses, other = ([generator.gauss(0.5, 0.2) for _ in range(7)] for _ in range(2))
        passed += paired_permutation(losses, other, seed=1) <= alpha
    assert 0.03 < passed / runs < 0.07


def test_a_real_gain_is_found() -> None:
    generator = random.Random(12)
    before = [generator.gauss(0.50, 0.3) for _ in range(300)]
    after = [loss - generator.gauss(0.03, 0.15) for loss in before]
    assert paired_permutation(before, after, seed=1) < 0.01
    assert paired_permutation(after, before, seed=1) > 0.99


def test_unequal_lengths_and_nonsense_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, False], [True])
    with pytest.raises(ValueError, match="shorter"):
        paired_permutation([0.1, 0.2], [0.1], seed=0)
    with pytest.raises(ValueError, match="finite"):
        paired_permutation([0.1], [float("nan")], seed=0)


def test_welch_against_a_worked_example() -> None:
    """2 / sqrt(2.5 / 5 + 2.5 / 5) = 2 for 1..5 and 3..7; the normal distribution has 0.02275 above 2."""
    low, high = [1.0, 2, 3, 4, 5], [3.0, 4, 5, 6, 7]
    assert welch(high, low) == pytest.approx(0.02275, abs=1e-5)
    assert welch(low, high) == pytest.approx(0.97725, abs=1e-5)
    assert welch([1.0, 1.0], [0.0, 0.0]) == 0.0
    assert welch([1.0, 1.0], [1.0, 1.0]) == welch([5.0], low) == 1.0
