"""The search for the likeliest of several answers: exact, and in steps that others can wait for."""

import itertools
import math

import numpy as np
import pytest

from agentd.engine.choices import ChoiceSearch

VOCABULARY = 20
AT_ONCE = 5


def distribution(prefix: tuple[int, ...]) -> np.ndarray:
    """Some log p(token | prefix)."""
    logits = np.random.default_rng([7, *prefix]).standard_normal(VOCABULARY) * 2
    return np.asarray(logits - np.log(np.exp(logits).sum()), dtype=np.float32)


def likelihood(tokens: list[int]) -> float:
    return math.fsum(float(distribution(tuple(tokens[:i]))[token]) for i, token in enumerate(tokens))


def answers(number: int, length: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    drawn = {tuple(int(t) for t in random.integers(0, 3, random.integers(1, length))) for _ in range(number)}
    return [[*tokens, VOCABULARY - 1] for tokens in sorted(drawn)]


@pytest.mark.parametrize(("number", "length"), [(2, 3), (20, 6), (60, 40)])
@pytest.mark.parametrize("seed", range(4))
def test_the_likeliest_is_found_in_small_steps(number: int, length: int, seed: int) -> None:
    several = answers(number, length, seed)
    search = ChoiceSearch(several)
    seen: set[tuple[int, ...]] = set()
    looked: list[list[int]] = []
    while (beginning := search.open()) is not None:
        new = [tuple(beginning[:i]) for i in range(len(beginning)) if tuple(beginning[:i]) not in seen]
        assert 1 <= len(new) <= AT_ONCE
        for prefix in new:
            search.observe(prefix, distribution(prefix))
        seen.update(new)
        looked.append(beginning)
    chosen = search.choose(np.random.default_rng(0))
    assert likelihood(several[chosen]) == pytest.approx(max(map(likelihood, several)))
    # One is looked at to its end, or until it cannot win any more: no one comes back to it.
    changes = [b for a, b in itertools.pairwise(looked) if b[: len(a)] != a]
    assert len(changes) < len(several)
