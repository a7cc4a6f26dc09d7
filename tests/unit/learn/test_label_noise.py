"""Answers that the others speak against: how likely an answer is among others, and how much it counts."""

import math
import random
from collections import Counter

import pytest

from agentd.learn.encoded import PREFERENCE, Encoded
from agentd.learn.label_noise import LabelNoise, surprisals

N = 400


def text(*tokens: int) -> Encoded:
    return Encoded([1], [[]], [], 0, [(0, i, token) for i, token in enumerate(tokens)])


def label(correct: int, choices: int = 2) -> Encoded:
    return Encoded([1], [[i] for i in range(choices)], [[(i, 0, i)] for i in range(choices)], correct, [(0, 0, 0)])


def noise(examples: list[Encoded], dev: int = 0) -> LabelNoise:
    """All of one group; the last `dev` judge."""
    numbers, last = range(len(examples)), len(examples) - dev
    groups = dict.fromkeys(numbers, 1)
    return LabelNoise(
        dict(enumerate(examples)),
        {n: group for n, group in groups.items() if n < last},
        {n: group for n, group in groups.items() if n >= last},
    )


def epoch(state: LabelNoise, likelihoods: list[float]) -> list[float]:
    return [state.weight(number, likelihood) for number, likelihood in enumerate(likelihoods)]


@pytest.mark.parametrize("seed", range(5))
def test_a_label_is_as_likely_as_it_is_frequent_among_the_others(seed: int) -> None:
    chance = random.Random(seed)
    labels = [chance.choices(range(4), [8, 4, 2, 1])[0] for _ in range(N)]
    counts = Counter(labels)
    for one, surprisal in zip(labels, surprisals([[one] for one in labels], 4, ()), strict=True):
        assert math.exp(-surprisal) == pytest.approx((counts[one] - 1) / (N - 1), abs=0.01)


def test_what_every_answer_has_costs_nothing_and_no_answer_vouches_for_itself() -> None:
    chance = random.Random(0)
    frame = [90, 91, 92, 93, 94, 95]
    answers = [[*frame, word := chance.randrange(8), 20 + word, *frame] for _ in range(N)]
    once = [*frame, 70, 71, *frame]
    *common, rare = surprisals([*answers, once], 100)
    assert sum(common) / len(common) == pytest.approx(math.log(8), abs=0.7), "one of eight words is all that differs"
    assert rare > 2 * max(common)


def test_next_tokens_are_a_distribution() -> None:
    """Of all that could follow, the likelihoods are one together: nothing is likelier than it can be."""
    chance = random.Random(1)
    vocabulary = 6
    answers = [[chance.randrange(4) for _ in range(chance.randrange(1, 9))] for _ in range(30)]
    before = max(answers)[:3]
    without = surprisals([*answers, before], vocabulary)[-1]
    total = 0.0
    for token in range(vocabulary):
        total += math.exp(without - surprisals([*answers, [*before, token]], vocabulary)[-1])
    assert total == pytest.approx(1, abs=0.02)


def test_a_model_that_knows_too_little_doubts_nobody() -> None:
    state = noise([label(i % 2) for i in range(40)])
    for _ in range(3):
        assert epoch(state, [-20.0] * 40) == [1.0] * 40


@pytest.mark.parametrize("wrong", [0.05, 0.2, 0.35])
@pytest.mark.parametrize("seed", range(3))
def test_wrong_answers_count_little_and_right_ones_nearly_all(wrong: float, seed: int) -> None:
    chance = random.Random(seed)
    calls = [[9, 8, 7, chance.randrange(12), 6, chance.randrange(12), 5] for _ in range(N)]
    is_wrong = [chance.random() < wrong for _ in calls]
    # What a model says that has learned from the others: sure of the right ones, more or less.
    seen = [-chance.uniform(7, 14) if bad else -chance.expovariate(1) for bad in is_wrong]
    state = noise([text(*call) for call in calls])
    epoch(state, seen)
    weights = epoch(state, seen)
    assert sum(w for w, bad in zip(weights, is_wrong, strict=True) if bad) / sum(is_wrong) < (
        0.4 if wrong < 0.1 else 0.15
    )
    assert sum(w for w, bad in zip(weights, is_wrong, strict=True) if not bad) / (N - sum(is_wrong)) > 0.9
    assert set(state.doubted) <= {n for n, w in enumerate(weights) if w < 0.5}
    if wrong >= 0.2:
        assert len(set(state.doubted) & {n for n, bad in enumerate(is_wrong) if bad}) > 0.7 * sum(is_wrong)


def test_among_right_answers_hard_ones_go_on_counting() -> None:
    """A share of wrong ones that is nearly nothing leaves a hard answer most of its weight."""
    calls = [[9, 8, 7, i % 12, 6, i % 7, 5] for i in range(N)]
    seen = [-6.0 if not i % 50 else -0.5 for i in range(N)]
    state = noise([text(*call) for call in calls])
    epoch(state, seen)
    assert min(epoch(state, seen)) > 0.8


def test_where_most_are_unlikely_they_are_news_and_not_noise() -> None:
    state = noise([label(i % 2) for i in range(N)])
    contradicted = [-6.0 if i % 3 else -0.1 for i in range(N)]
    epoch(state, contradicted)
    assert set(epoch(state, contradicted)) == {1.0}
    assert state.doubted == []


def test_what_was_only_compared_or_is_long_or_belongs_to_few_is_never_doubted() -> None:
    pairs = [Encoded([1], [[]], [[(0, 0, 1)], [(0, 0, 2)]], 0, [(0, 0, 1)], PREFERENCE) for _ in range(40)]
    long = [text(*range(65)) for _ in range(40)]
    for examples in (pairs, long, [label(i % 2) for i in range(15)]):
        state, seen = noise(examples), [-30.0 if not i % 5 else -0.1 for i in range(len(examples))]
        for _ in range(3):
            assert set(epoch(state, seen)) == {1.0}


def test_who_judges_is_spared_what_is_wrong_with_it() -> None:
    state = noise([label(i % 2) for i in range(N)], dev=2)
    judge = N - 1
    assert state.spared(judge, -9.0) == 0.0, "nothing is known of how many are wrong"
    seen = [-7.0 if not i % 5 else -0.05 for i in range(N - 2)]
    epoch(state, seen), epoch(state, seen)
    share = state.as_json()["groups"][0]["share"]
    assert 0.3 < share < 0.45, "twice as many as are wrong: of two labels chance has every second one right"
    for likelihood in (-0.01, -0.7, -3.0, -9.0, -300.0):
        mixed = (1 - share) * math.exp(likelihood) + share / 2
        assert state.spared(judge, likelihood) == pytest.approx(math.log(mixed) - likelihood, abs=0.01)


@pytest.mark.parametrize("likelihood", [math.nan, -math.inf])
def test_what_is_no_number_says_nothing(likelihood: float) -> None:
    """No step is taken by it (LossNotFinite); what was seen of the others goes on counting."""
    state = noise([label(i % 2) for i in range(N)], dev=1)
    seen = [-7.0 if not i % 5 else -0.05 for i in range(N - 1)]
    epoch(state, seen)
    before = state.as_json()
    assert state.weight(0, likelihood) == 1.0
    assert state.spared(N - 1, likelihood) == 0.0
    assert state.as_json() == before


def test_it_goes_on_where_it_was() -> None:
    chance = random.Random(3)
    examples = [label(chance.randrange(2)) for _ in range(60)]
    seen = [-chance.expovariate(0.7) for _ in examples]
    seen[:10] = [-8.0] * 10
    state, other = noise(examples), noise(examples)
    epoch(state, seen), epoch(state, seen)
    other.restore(state.as_json())
    assert other.doubted == state.doubted
    assert epoch(other, seen) == epoch(state, seen)
