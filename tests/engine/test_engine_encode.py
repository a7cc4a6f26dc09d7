"""How an example becomes sequences and terms."""

import random

import pytest

from agentd.engine.encode import common_prefix, encode, n_distinct
from agentd.engine.protocol import Encoded, Term

END = 99
PROMPT = [1, 2, 3]


def said(encoded: Encoded, terms: list[Term]) -> list[int]:
    """The tokens that the terms score, after checking that every one is predicted from just what came before it."""
    fed: list[int] = []
    for s, p, token in terms:
        assert encoded.sequences[s][: p + 1] == PROMPT + fed
        fed.append(token)
    return fed


def test_single_token_choices_share_one_sequence() -> None:
    encoded = encode(PROMPT, [[10], [11]], [11], END)
    assert encoded.sequences == [[1, 2, 3, 11]]
    assert encoded.choices == [[(0, 2, 10)], [(0, 2, 11)]]
    assert encoded.correct == 1
    assert encoded.target == [(0, 2, 11), (0, 3, END)]


def test_longer_choices_get_sequences_of_their_own() -> None:
    encoded = encode(PROMPT, [[10, 20], [11, 21, 31]], [10, 20], END)
    assert sorted(encoded.sequences) == [[1, 2, 3, 10, 20], [1, 2, 3, 11, 21]]
    assert [said(encoded, terms) for terms in encoded.choices] == [[10, 20], [11, 21, 31]]
    assert said(encoded, encoded.target) == [10, 20, END]


def test_a_choice_that_begins_another_is_scored_with_the_end_of_turn() -> None:
    encoded = encode(PROMPT, [[10], [10, 20], [30]], [10], END)
    assert [said(encoded, terms) for terms in encoded.choices] == [[10, END], [10, 20, END], [30, END]]


def test_free_text_has_a_target_only() -> None:
    encoded = encode(PROMPT, [], [5, 6], END)
    assert (encoded.sequences, encoded.choices, encoded.correct) == ([[1, 2, 3, 5, 6]], [], 0)
    assert said(encoded, encoded.target) == [5, 6, END]


@pytest.mark.parametrize("seed", range(40))
def test_any_example_is_laid_out_consistently(seed: int) -> None:
    rng = random.Random(seed)
    choices = [list(c) for c in {tuple(rng.choices((10, 11, 12), k=rng.randint(1, 4))) for _ in range(4)}]
    target = rng.choice(choices)
    encoded = encode(PROMPT, choices, target, END)
    assert choices[encoded.correct] == target
    assert said(encoded, encoded.target) == [*target, END]
    answers = [said(encoded, terms) for terms in encoded.choices]
    assert [answer[: len(choice)] for answer, choice in zip(answers, choices, strict=True)] == choices
    assert not any(a is not b and b[: len(a)] == a for a in answers for b in answers)
    for i, sequence in enumerate(encoded.sequences):
        others = encoded.sequences[:i] + encoded.sequences[i + 1 :]
        assert not any(other[: len(sequence)] == sequence for other in others)


def test_the_common_prefix_leaves_every_sequence_a_token() -> None:
    assert common_prefix([]) == 0
    assert common_prefix([[1, 2, 3]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2]]) == 1
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == 2
    assert common_prefix([[1], [2]]) == 0


def test_shared_tokens_cost_once() -> None:
    assert n_distinct([[1, 2, 3, 4]]) == 4
    assert n_distinct([[1, 2, 3, 4], [1, 2, 3, 5, 6]]) == 6
