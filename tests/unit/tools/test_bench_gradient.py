"""The report on gradients drives a real engine and the trainer's own code, and compares with torch alone."""

import asyncio
from pathlib import Path

import pytest
import torch

from tools import tiny_model
from tools.bench.paper.gradient import autograd, blockwise, cosines


@pytest.mark.slow
def test_gradients_by_block_are_those_of_full_autograd(tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path / "tiny.gguf")
    once, tokens = asyncio.run(blockwise(model, 3, tmp_path))
    theirs = autograd(model, once, tokens)
    by_dtype = {name: cosines(ours, theirs) for name, ours in once.gradients.items()}
    assert [*by_dtype] == ["float32", "bfloat16"]
    assert all([*by_block] == list(range(tiny_model.N_BLOCKS)) for by_block in by_dtype.values())
    assert min(by_dtype["float32"].values()) > 0.999  # its weights are float32, and hardly anything is rounded
    assert min(by_dtype["bfloat16"].values()) > 0.99
    assert by_dtype["bfloat16"] != by_dtype["float32"]


def test_a_cosine_is_over_all_matrices_of_a_block() -> None:
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    ours = {"blk.0.x.weight": (one, two), "blk.1.x.weight": (one, one)}
    theirs = {"blk.0.x.weight": (one, two), "blk.1.x.weight": (two, two)}
    assert cosines(ours, theirs) == pytest.approx({0: 1.0, 1: 0.0})
    assert cosines(ours, {**theirs, "blk.0.x.weight": (one, -two)})[0] == pytest.approx((9 - 16) / 25)
