"""Labels that change places are found within days, and nothing else is taken for that."""

import random
from collections import Counter

import pytest

from agentd.learn.concept_drift import ConceptDrift, JudgedAnswer, changed_places

LABELS = ("bad", "good")
SEEDS = range(20)


def life(
    seed: int, right: list[float], *, errors_only: int = 99, likely: float = 0.5, a_day: int = 20
) -> ConceptDrift | None:
    """What is found in days in each of which so large a share of answers was right; from day `errors_only` on right
    ones are not judged any more. `likely` is the share of inputs that are bad."""
    chance = random.Random(seed)
    answers, served = list[JudgedAnswer](), Counter[str]()
    for number, share in enumerate(right, 1):
        day = f"2026-03-{number:02}"
        for _ in range(a_day):
            meant = LABELS[chance.random() >= likely]
            given = meant if chance.random() < share else LABELS[meant == "bad"]
            served[day] += 1
            if number < errors_only or given != meant:
                answers.append(JudgedAnswer(day, given, meant))
    return changed_places(answers, served)


def found(right: list[float], **how: float) -> list[ConceptDrift]:
    return [drift for seed in SEEDS if (drift := life(seed, right, **how)) is not None]  # type: ignore[arg-type]


def test_labels_that_change_places_are_found_in_two_days() -> None:
    drifts = found([0.9] * 8 + [0.1] * 2)
    assert len(drifts) >= 19
    assert {drift.labels for drift in drifts} == {LABELS}
    assert {drift.day for drift in drifts} == {"2026-03-09"}


def test_a_model_that_knows_little_needs_longer() -> None:
    drifts = found([0.65] * 10 + [0.35] * 14)
    assert len(drifts) >= 15
    assert {drift.day for drift in drifts} <= {f"2026-03-{day:02}" for day in range(8, 15)}  # about the eleventh


@pytest.mark.parametrize(
    "right",
    [
        [0.7] * 28,
        [0.5] * 28,
        [0.9] * 10 + [0.72] * 18,  # a fifth of the corrections is wrong
        [0.9] * 10 + [0.5] * 18,  # inputs of which the model knows nothing
        [0.9] * 10 + [0.1],  # one day
        [0.1] * 10,  # never any other
    ],
)
def test_what_is_only_worse_is_no_change(right: list[float]) -> None:
    assert len(found(right)) <= 1


@pytest.mark.parametrize("right", [[0.9] * 20, [0.7] * 20])
def test_who_corrects_mistakes_only_from_now_on_says_nothing_new(right: list[float]) -> None:
    assert found(right, errors_only=11) == []


def test_other_inputs_are_no_change() -> None:
    """A model that always says the one is wrong more often when there is more of the other."""
    answers = [JudgedAnswer(f"2026-03-{day:02}", "bad", "bad" if i < n else "good")
               for day, n in enumerate([18] * 10 + [2] * 10, 1) for i in range(20)]  # fmt: skip
    assert changed_places(answers, {}) is None


def test_of_many_labels_two_may_change_places() -> None:
    chance = random.Random(1)
    labels = [f"label {i}" for i in range(8)]
    swapped = {"label 2": "label 5", "label 5": "label 2"}
    answers = []
    for day in range(1, 15):
        for _ in range(60):
            given = chance.choice(labels)
            right = given if chance.random() < 0.9 else chance.choice(labels)
            answers.append(JudgedAnswer(f"2026-03-{day:02}", given, swapped.get(right, right) if day > 9 else right))
    drift = changed_places(answers, {})
    assert drift == ConceptDrift("2026-03-10", ("label 2", "label 5"))
