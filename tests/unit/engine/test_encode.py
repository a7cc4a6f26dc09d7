"""How an example becomes sequences and terms."""

import json
import random
from dataclasses import asdict

import pytest

from agentd.engine.encode import encode, encode_pair
from agentd.errors import InvalidRequest
from agentd.learn.encoded import Encoded, Term, common_prefix, shared_prefix

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


@pytest.mark.parametrize(("chosen", "rejected"), [([10, 20], [11]), ([10], [10, 20]), ([10, 20, 30], [10, 20])])
def test_a_pair_has_both_answers_with_their_end_of_turn(chosen: list[int], rejected: list[int]) -> None:
    encoded = encode_pair(PROMPT, chosen, rejected, END)
    assert (encoded.objective, encoded.correct) == ("preference", 0)
    assert [said(encoded, terms) for terms in encoded.choices] == [[*chosen, END], [*rejected, END]]
    assert encoded.target == encoded.choices[0]
    assert Encoded.from_json(json.loads(json.dumps(asdict(encoded)))) == encoded


def test_an_answer_is_not_preferred_to_itself() -> None:
    with pytest.raises(InvalidRequest, match="the same"):
        encode_pair(PROMPT, [10], [10], END)


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


def test_shared_tokens_cost_once_and_are_there_once() -> None:
    assert Encoded.of([[1, 2, 3, 4]], [], 0, []).n_distinct == 4
    encoded = Encoded.of([[1, 2, 3, 4], [1, 2, 3, 5, 6]], [], 0, [])
    assert (encoded.shared, encoded.own) == ([1, 2, 3], [[4], [5, 6]])
    assert (encoded.n_distinct, encoded.n_tokens, encoded.longest) == (6, 9, 5)
    assert encoded.sequences == [[1, 2, 3, 4], [1, 2, 3, 5, 6]]
    assert Encoded.from_json(json.loads(json.dumps(asdict(encoded)))) == encoded


def test_the_shared_prefix_ends_where_something_is_scored() -> None:
    """What all sequences begin with is there once, and never a row that is scored."""
    forked = Encoded.of([[1, 2, 3, 4], [1, 2, 3, 9]], [[(0, 3, 5)], [(1, 3, 6)]], 0, [(0, 3, 5)])
    plain = Encoded.of([[1, 2, 3, 7, 8]], [], 0, [(0, 4, 5)])
    assert shared_prefix([forked, plain]) == 3
    early = Encoded.of([[1, 2, 3, 7, 8]], [], 0, [(0, 1, 3), (0, 2, 7)])
    assert shared_prefix([forked, early]) == 1
    assert shared_prefix([Encoded.of([[1, 2, 3]], [], 0, [(0, 2, 7)])]) == 2
