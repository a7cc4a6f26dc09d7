"""The pieces that a trainer takes its work in, and the sizes of work that is known from its texts only."""

from dataclasses import replace
from pathlib import Path

import pytest

from agentd.budget.model_shapes import ModelShapes
from agentd.budget.workload import Workload, computed_tokens, micro_batch, micro_tokens
from agentd.formats.gguf_header import read_header


@pytest.fixture(scope="module")
def arch(real_model: Path) -> ModelShapes:
    return ModelShapes.from_header(read_header(real_model))


@pytest.mark.parametrize(
    ("k", "checkpoint", "expected"),
    [
        (1, False, 384),
        (4, False, 384),
        (8, False, 384),
        (12, False, 352),
        (16, False, 256),
        (24, False, 160),
        (30, False, 128),
        (30, True, 384),
    ],
)
def test_more_blocks_in_memory_get_fewer_tokens_at_a_time(
    arch: ModelShapes, k: int, checkpoint: bool, expected: int
) -> None:
    """36 kB a token and block kept, up to 144 MiB for all of them: 15 x 36,864 B x 256 = 135 MiB."""
    assert micro_tokens(arch, k, checkpoint) == expected
    assert micro_tokens(arch, k, checkpoint, small=True) == 128


@pytest.mark.parametrize("k", [1, 8, 16, 30])
def test_a_long_prefix_is_computed_for_as_much_as_it_is_itself(arch: ModelShapes, k: int) -> None:
    """An agent's tools stand before every command: 484 tokens before some 50 of each example."""
    work = Workload(seq_len=59, tokens=640 * 50, examples=640, prefix=484, batch=8)
    micro = micro_tokens(arch, k, prefix=work.prefix)
    assert micro == 992
    assert micro_batch(arch, work, k) == (484 + 8 * 59, 8)
    assert computed_tokens(work, micro) == 640 * 50 + 80 * 484
    alone = micro_tokens(arch, k, small=True, prefix=work.prefix)
    assert computed_tokens(work, alone) == 640 * (50 + 484)
    assert micro_tokens(arch, k, prefix=50) == micro_tokens(arch, k)


def test_the_largest_micro_batch(arch: ModelShapes) -> None:
    work = Workload(seq_len=40, tokens=10_000, examples=300, prefix=38)
    assert micro_batch(arch, work, 1) == (384, 10)  # (384 - 38) / 33.3, the mean
    assert micro_batch(arch, replace(work, batch=2), 1) == (118, 2)
    assert micro_batch(arch, replace(work, seq_len=470, tokens=300 * 400), 8) == (
        508,
        1,
    )  # longer than allowed: one at a time
    assert micro_batch(arch, work, 8, one=True) == (384, 10)
    # Two examples of 200 tokens do not fit, of 170 they do; where one is short, the rest may be anything.
    for shortest, rows in ((200, 38 + 200), (170, 38 + 2 * 173), (10, 384), (0, 384)):
        alike = replace(work, seq_len=max(173, shortest), shortest=shortest)
        assert micro_batch(arch, alike, 8)[0] == min(384, rows)


def test_a_workload_estimated_from_texts() -> None:
    texts = [f"Did the reviewer like it? Review {i:03}: " + "word " * (20 + i % 7) for i in range(100)]
    work = Workload.estimated(texts, [{"positive", "negative"}] * 100)
    assert work.examples == 100
    assert 40 < work.longest < 100
    assert 0 < work.prefix < 10
    assert 20 * 100 < work.tokens < 60 * 100
    assert work.scored == 6  # the first token's position, two more of each, the end of turn's
    assert work.terms == 12
    assert Workload.estimated(["x" * 10_000]).longest == 2048
    assert Workload.estimated(["x" * 10_000], context=1024).longest == 1024
    assert Workload.estimated([]).examples == 0
