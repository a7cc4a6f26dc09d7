"""From an example's tokens to the sequences and terms that scoring, tapping and training share. Pure."""

from collections.abc import Sequence
from typing import Any

from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Encoded, Term
from agentd.errors import InvalidRequest


def encode_example(
    vocabulary: Prompts, input: dict[str, Any], choices: Sequence[str], target: str, *, limit: int, answers: int
) -> Encoded:
    """Lays out an example as it was given.

    limit    most tokens that an example may have
    answers  most different answers that are computed side by side

    Raises InvalidRequest for an example that cannot be learned from.
    """
    prompt = vocabulary.prompt(input)
    if not prompt:
        raise InvalidRequest("the prompt is empty")
    if choices and target not in choices:
        raise InvalidRequest(f"the answer {target!r} is not one of the choices")
    tokens = {text: vocabulary.answer(input, prompt, text) for text in (*choices, target)}
    encoded = encode(prompt, [tokens[choice] for choice in choices], tokens[target], vocabulary.end)
    if (n := n_distinct(encoded.sequences)) > limit:
        raise InvalidRequest(f"{n} tokens are more than the {limit} that an example may have")
    if (n := len(encoded.sequences)) > answers:
        raise InvalidRequest(f"{n} different answers are more than the {answers} of a background batch")
    return encoded


def encode(prompt: list[int], choices: Sequence[list[int]], target: list[int], end: int) -> Encoded:
    """Lays out an example.

    prompt   tokens up to the answer
    choices  the tokens of every choice, without the end of turn; empty for free text
    target   the tokens of the right answer, without the end of turn
    end      the end-of-turn token

    A choice that begins another ("no", "no way") could not be told from it by its own tokens, so then every choice
    is scored with the end of turn.
    """
    answers = [list(choice) for choice in choices]
    if any(a is not b and b[: len(a)] == a for a in answers for b in answers):
        answers = [[*answer, end] for answer in answers]
    whole = [*target, end]
    # The last token of an answer is predicted, never fed.
    needed = [prompt + answer[:-1] for answer in (*answers, whole)]
    sequences: list[list[int]] = []
    for sequence in sorted(needed, key=len, reverse=True):
        if not any(kept[: len(sequence)] == sequence for kept in sequences):
            sequences.append(sequence)

    def terms(answer: list[int]) -> list[Term]:
        fed = prompt + answer[:-1]
        s = next(i for i, sequence in enumerate(sequences) if sequence[: len(fed)] == fed)
        return [(s, len(prompt) - 1 + i, token) for i, token in enumerate(answer)]

    correct = list(map(list, choices)).index(list(target)) if choices else 0
    return Encoded(sequences, [terms(answer) for answer in answers], correct, terms(whole))


def n_distinct(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that an example costs when what all its sequences begin with is computed once."""
    shared = common_prefix(sequences) if len(sequences) > 1 else 0
    return sum(map(len, sequences)) - (len(sequences) - 1) * shared


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning that leaves every sequence at least one token."""
    if not sequences:
        return 0
    low, high = min(map(list, sequences)), max(map(list, sequences))
    limit = min(map(len, sequences)) - 1
    n = 0
    while n < limit and low[n] == high[n]:
        n += 1
    return n


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """Length of what all sequences of all examples begin with, up to the first position that is scored."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    first_term = min(p for example in examples for terms in (*example.choices, example.target) for _, p, _ in terms)
    return min(common_prefix(sequences), first_term)
