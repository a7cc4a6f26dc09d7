"""The vocabulary head in slices computes what the whole one computes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

from agentd.nn import matrix as matrix_module
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.head import Head
from agentd.nn.matrix import Matrix

WIDTH, VOCABULARY = 24, 100


def make_head(folder: Path, scale: float, softcap: float, biased: bool) -> tuple[Head, torch.Tensor]:
    """A head whose matrix lies in a GGUF file, and the matrix."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(VOCABULARY, WIDTH, generator=generator).half()
    writer = gguf.GGUFWriter(folder / "head.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_tensor("output.weight", matrix.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    head = Head.__new__(Head)
    head.norm = torch.nn.LayerNorm(WIDTH).requires_grad_(False)
    head.matrix = Matrix(GGUFFile(folder / "head.gguf"), "output.weight")
    head.bias = torch.randn(VOCABULARY, generator=generator) if biased else None
    head.scale, head.softcap = scale, softcap
    return head, matrix.float()


@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, 0.0, False), (0.25, 0.0, True), (2.0, 5.0, True)])
def test_slices_give_the_naive_values_and_gradients(
    scale: float, softcap: float, biased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_module, "PART_WEIGHTS", 7 * WIDTH)  # 7 does not divide the vocabulary
    head, matrix = make_head(tmp_path, scale, softcap, biased)
    generator = torch.Generator().manual_seed(2)
    row, token = torch.tensor([0, 0, 3, 2, 3]), torch.tensor([5, 99, 0, 5, 63])
    upstream = torch.randn(5, generator=generator)
    hidden = 3 * torch.randn(4, WIDTH, generator=generator)

    mine = hidden.clone().requires_grad_()
    terms = head.log_likelihoods(mine, row, token)
    torch.autograd.backward(terms, upstream)

    naive = hidden.clone().requires_grad_()
    logits = head.norm(naive) @ matrix.T * scale
    logits = logits + head.bias if head.bias is not None else logits
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.log_softmax(-1)[row, token]
    torch.autograd.backward(expected, upstream)

    assert torch.allclose(terms, expected, rtol=1e-5, atol=1e-5)
    assert mine.grad is not None
    assert naive.grad is not None
    assert torch.allclose(mine.grad, naive.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(head.log_likelihoods(hidden, row, token), terms)


def test_large_logits_stay_finite(tmp_path: Path) -> None:
    head, _ = make_head(tmp_path, 1000.0, 0.0, False)
    terms = head.log_likelihoods(torch.ones(1, WIDTH).cumsum(1), torch.tensor([0]), torch.tensor([1]))
    assert torch.isfinite(terms).all()


def test_a_head_that_transformers_computes_differently_is_refused(model_path: Any) -> None:
    from agentd.nn.blocks import Blocks, Unsupported

    blocks = Blocks(GGUFFile(model_path), 5, 6)
    plain = blocks.model.forward
    blocks.model.forward = lambda **kwargs: SimpleNamespace(logits=plain(**kwargs).logits * 2)
    with pytest.raises(Unsupported, match="head computes something"):
        Head(blocks)
