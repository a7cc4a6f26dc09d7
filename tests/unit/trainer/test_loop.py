"""How an epoch is divided into batches."""

import random

from agentd.learn.encoded import Encoded
from agentd.trainer.batches import Example, batches
from agentd.trainer.loop import batches_of
from agentd.trainer.spec import TrainOptions
from agentd.trainer.trunk import at_once


def example(number: int, length: int) -> Example:
    return Example(number, Encoded.of([[1] * length], [], 0, [(0, length - 1, 1)]))


def padded(parts: list[list[Example]]) -> int:
    return sum(len(part) * max(e.encoded.longest for e in part) for part in parts)


def test_an_epoch_has_every_example_once_and_batches_of_similar_length() -> None:
    chance = random.Random(1)
    examples = [example(i, chance.randint(5, 60)) for i in range(203)]
    parts = batches_of(examples, 7, 0, 8)
    assert sorted(e.number for part in parts for e in part) == list(range(203))
    assert sorted(map(len, parts)) == [3] + 25 * [8]
    shuffled = chance.sample(examples, len(examples))
    by_chance = padded([shuffled[i : i + 8] for i in range(0, len(shuffled), 8)])
    assert padded(parts) < 0.75 * by_chance
    # Short ones do not come first: a forward pass over all of them in order would learn lengths.
    first, last = ([e.encoded.longest for part in half for e in part] for half in (parts[:13], parts[13:]))
    assert abs(sum(first) / len(first) - sum(last) / len(last)) < 12


def test_it_is_the_same_again_and_another_in_the_next_epoch() -> None:
    examples = [example(i, 5 + i % 50) for i in range(100)]
    assert batches_of(examples, 7, 0, 8) == batches_of(examples, 7, 0, 8)
    assert batches_of(examples, 7, 0, 8) != batches_of(examples, 7, 1, 8)
    assert batches_of(examples, 7, 0, 8) != batches_of(examples, 8, 0, 8)


def test_a_batch_larger_than_what_is_put_together() -> None:
    examples = [example(i, 5 + i) for i in range(10)]
    assert [len(part) for part in batches_of(examples, 0, 0, 100)] == [10]


def test_a_long_prefix_is_run_for_many_examples_in_the_trunk_too() -> None:
    examples = [example(i, 1000 + 30) for i in range(64)]
    assert len(batches(examples, 1000, at_once(TrainOptions(micro_tokens=2016)), together=True)) == 2
    assert at_once(TrainOptions(micro_tokens=128)) == 384
