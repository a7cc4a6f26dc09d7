"""Products with a matrix that stays in the file are those with the matrix in memory, and so are whole blocks."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from agentd.nn import matrix as matrix_module
from agentd.nn.blocks import Blocks
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.linear_ops import adapted, exactly, frozen
from agentd.nn.matrix import Matrix, part_space
from agentd.nn.vjp import vjp
from tools import shape_model

OUT, IN, RANK = 50, 64, 3
FAMILIES = ("qwen3", "llama3.2", "gemma3", "phi4-mini", "granite4", "lfm2", "qwen3.5", "qwen3-moe")


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    weights = np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(IN)
    quantised = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("matrix", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(tmp_path / "model.gguf")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("part", [1, 7 * IN, 50 * IN])  # weights: a row, 8 parts, the whole
def test_a_part_at_a_time_gives_the_whole_product(
    dtype: torch.dtype, tolerance: float, rows: int, part: int, file: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_module, "PART_WEIGHTS", part)
    matrix, whole = Matrix(file, "matrix", dtype, part_space(dtype, IN)), file.load("matrix", dtype)
    rows_of_parts = {1: [1] * 50, 7 * IN: [7] * 7 + [1], 50 * IN: [50]}
    assert [end - begin for begin, end, _ in matrix.parts()] == rows_of_parts[part]
    x, bias = draw(2, rows, IN, seed=1), draw(OUT, seed=2)
    a, b, output_gradient = draw(RANK, IN, seed=3), draw(OUT, RANK, seed=4), draw(2, rows, OUT, seed=5)
    results = []
    for weight in (matrix, whole):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        mine, own_a, own_b = inputs
        plain, low_rank = frozen(mine, weight, bias), adapted(mine, weight, bias, own_a, own_b, 0.5)
        torch.autograd.backward(vjp([(plain, output_gradient), (low_rank, output_gradient)]))
        results.append([plain, low_rank, *(tensor.grad for tensor in inputs)])
    for ours, expected in zip(*results, strict=True):
        assert ours is not None
        assert expected is not None
        assert (ours - expected).norm() <= tolerance * expected.norm()
    with exactly():
        assert torch.allclose(frozen(x, matrix, bias), x @ whole.float().T + bias, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("in_memory", [False, True])
def test_blocks_whose_matrices_stay_in_the_file(name: str, in_memory: bool, tmp_path: Path) -> None:
    """All kinds of blocks; no plain matrix of theirs has memory of its own."""
    file = GGUFFile(shape_model.write(tmp_path / "model.gguf", name))
    n = file.header.block_count
    plain, streamed = (Blocks(file, n - 2, n, in_memory=in_memory, streamed=streamed) for streamed in (False, True))
    assert streamed.fused == plain.fused
    assert all(getattr(*place).weight.is_meta for place in streamed.linears.values())
    inputs = draw(1, 9, plain.n_embd, seed=6)
    results = []
    for blocks in (plain, streamed):
        if not in_memory:
            blocks.activate(n - 2)
        x = inputs.clone().requires_grad_()
        y = blocks.run(x)
        torch.autograd.backward(vjp([(y, inputs)]))
        results.append((y, x.grad))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert ours is not None
        assert expected is not None
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
