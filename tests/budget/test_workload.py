"""The pieces that a trainer takes its work in, and the sizes of work that is known from its texts only."""

from dataclasses import replace
from pathlib import Path

import pytest

from agentd.budget.architecture import Architecture
from agentd.budget.workload import Workload, micro_batch, micro_tokens
from agentd.gguf_header import read_header


@pytest.fixture(scope="module")
def arch(model_path: Path) -> Architecture:
    return Architecture.from_header(read_header(model_path))


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
    arch: Architecture, k: int, checkpoint: bool, expected: int
) -> None:
    """36 kB a token and block kept, up to 144 MiB for all of them: 15 x 36,864 B x 256 = 135 MiB."""
    assert micro_tokens(arch, k, checkpoint) == expected
    assert micro_tokens(arch, k, checkpoint, small=True) == 128


def test_the_largest_micro_batch(arch: Architecture) -> None:
    work = Workload(seq_len=40, tokens=10_000, examples=300, prefix=38)
    assert micro_batch(arch, work, 1) == (384, 8)  # (384 - 38) / 40
    assert micro_batch(arch, replace(work, batch=2), 1) == (118, 2)
    assert micro_batch(arch, replace(work, seq_len=470), 8) == (508, 1)  # longer than allowed: one at a time
    assert micro_batch(arch, work, 8, one=True) == (384, 8)
    assert micro_batch(arch, replace(work, seq_len=100, sequences=3), 16) == (338, 3)


def test_a_workload_estimated_from_texts() -> None:
    texts = [f"Did the reviewer like it? Review {i:03}: " + "word " * (20 + i % 7) for i in range(100)]
    work = Workload.estimated(texts, ["positive", "negative"] * 50)
    assert work.examples == 100
    assert 40 < work.longest < 100
    assert 0 < work.prefix < 10
    assert 20 * 100 < work.tokens < 60 * 100
    assert work.scored == 4
    assert Workload.estimated(["x" * 10_000]).longest == 2048
    assert Workload.estimated(["x" * 10_000], context=1024).longest == 1024
    assert Workload.estimated([]).examples == 0
