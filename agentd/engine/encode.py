"""From an example's tokens to the sequences and terms that scoring, tapping and training share. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Target
from agentd.errors import InvalidRequest
from agentd.learn.encoded import LIKELIHOOD, PREFERENCE, Encoded, Term


def encode_example(
    vocabulary: Prompts,
    input: dict[str, Any],
    choices: Sequence[str],
    target: Target,
    *,
    limit: int,
    rejected: Target | None = None,
    objective: str = LIKELIHOOD,
    weight: float = 1.0,
    whole: bool = True,
) -> Encoded:
    """Lays out an example as it was given; `limit` is the most tokens that it may have, all answers together, and
    `rejected` the answer to which `target` is preferred; `objective` and `weight` as `Encoded` has them. A text that is
    not `whole` is the beginning of an answer: its words are scored, no end behind them.

    Raises InvalidRequest for an example that cannot be learned from.
    """
    prompt = vocabulary.prompt(input)
    if not prompt:
        raise InvalidRequest("the prompt is empty")
    if choices and target not in choices:
        raise InvalidRequest(f"the answer {target!r} is not one of the choices")

    def answer(target: Target) -> list[int]:
        if isinstance(target, str):
            return vocabulary.answer(input, prompt, target)
        return vocabulary.target(input, prompt, target)

    if rejected is not None:
        encoded = encode_pair(prompt, answer(target), answer(rejected), vocabulary.end)
    elif not whole:
        *before, last = answer(target) or [vocabulary.end]
        encoded = encode(prompt, [], before, last)
    else:
        encoded = encode(prompt, [answer(choice) for choice in choices], answer(target), vocabulary.end)
    encoded = replace(encoded, weight=weight, objective=encoded.objective if rejected is not None else objective)
    if (n := encoded.n_distinct) > limit:
        raise InvalidRequest(f"{n} tokens are more than the {limit} that an example may have")
    return encoded


def encode(prompt: list[int], choices: Sequence[list[int]], target: list[int], end: int) -> Encoded:
    """Lays out an example.

    prompt   tokens up to the answer
    choices  the tokens of every choice, without the end of turn; empty for free text
    target   the tokens of the right answer, without the end of turn
    end      the end-of-turn token

    """
    correct = list(map(list, choices)).index(list(target)) if choices else 0
    return _laid_out(prompt, scored_answers(choices, end), correct, [*target, end])


def encode_pair(prompt: list[int], chosen: list[int], rejected: list[int], end: int) -> Encoded:
    """Lays out two answers, without their end of turn, of which the first is preferred. Raises InvalidRequest."""
    if chosen == rejected:
        raise InvalidRequest("the chosen answer and the rejected one are the same")
    answers = [[*chosen, end], [*rejected, end]]
    return replace(_laid_out(prompt, answers, 0, answers[0]), objective=PREFERENCE)


def _laid_out(prompt: list[int], answers: list[list[int]], correct: int, whole: list[int]) -> Encoded:
    """`answers` are scored as they are; `whole` is the right one with its end of turn."""
    # The last token of an answer is predicted, never fed.
    needed = [prompt + answer[:-1] for answer in (*answers, whole)]
    sequences: list[list[int]] = []
    for sequence in sorted(needed, key=len, reverse=True):
        if not any(other[: len(sequence)] == sequence for other in sequences):
            sequences.append(sequence)

    def terms(answer: list[int]) -> list[Term]:
        fed = prompt + answer[:-1]
        s = next(i for i, sequence in enumerate(sequences) if sequence[: len(fed)] == fed)
        return [(s, len(prompt) - 1 + i, token) for i, token in enumerate(answer)]

    return Encoded.of(sequences, [terms(answer) for answer in answers], correct, terms(whole))


def scored_answers(choices: Sequence[Sequence[int]], end: int) -> list[list[int]]:
    """The tokens by whose likelihood choices are told apart, in serving as in training and at the gate.

    A choice that begins another ("no", "no way") could not be told from it by its own tokens, so then every choice
    is scored with the end of turn.
    """
    ordered = sorted(list(choice) for choice in choices)
    if any(b[: len(a)] == a for a, b in pairwise(ordered)):
        return [[*choice, end] for choice in choices]
    return [list(choice) for choice in choices]
