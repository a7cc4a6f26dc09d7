"""Products with frozen matrices: what autograd finds in full precision; in bfloat16 right to its precision and of few
shapes, with any number of rows."""

import pytest
import torch
from torch.nn.functional import linear

from agentd.nn.linear_ops import adapted, frozen

RANK, SCALE = 4, 2.0


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 7), (3, 21), (2, 64), (5, 40), (1, 0)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_narrow_product_and_its_gradient(shape: tuple[int, int], biased: bool) -> None:
    x = draw(*shape, 96).requires_grad_()
    weight = draw(33, 96, seed=1) / 96**0.5
    bias = draw(33, seed=2) if biased else None
    output_gradient = draw(*shape, 33, seed=3)
    expected = linear(x, weight, bias)
    (gradient,) = torch.autograd.grad(expected, x, output_gradient)

    y = frozen(x, weight.bfloat16(), bias)
    assert (y.dtype, y.shape) == (torch.float32, expected.shape)
    (narrow,) = torch.autograd.grad(y, x, output_gradient)
    if not x.numel():
        return
    # bfloat16 keeps 8 bits: 96 products of rounded factors are off by 2 % of their size at most.
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    assert (narrow - gradient).abs().max() < 0.02 * gradient.abs().max()
    assert torch.cosine_similarity(narrow.flatten(), gradient.flatten(), 0) > 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 21), (70,), (1, 0)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_low_rank_update_and_its_gradients(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    x = draw(*shape, 96)
    weight, bias = (draw(33, 96, seed=1) / 96**0.5).to(dtype), draw(33, seed=2) if biased else None
    a, b, output_gradient = draw(RANK, 96, seed=3) / 96**0.5, draw(33, RANK, seed=4), draw(*shape, 33, seed=5)
    learned = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    x1, a1, b1 = learned
    expected = linear(x1, weight.float() + SCALE * b1 @ a1, bias)
    gradients = torch.autograd.grad(expected, learned, output_gradient)

    again = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    y = adapted(again[0], weight, bias, again[1], again[2], SCALE)
    assert (y.dtype, y.shape) == (torch.float32, expected.shape)
    own = torch.autograd.grad(y, again, output_gradient)
    precision = 1e-5 if dtype == torch.float32 else 0.02
    for ours, theirs in zip((y, *own), (expected, *gradients), strict=True):
        assert ours.shape == theirs.shape
        if theirs.numel():
            assert (ours - theirs).abs().max() <= precision * theirs.abs().max()


def test_a_gradient_that_is_not_needed_is_not_computed() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    assert not frozen(x, weight.bfloat16(), None).requires_grad
    a, b = torch.ones(RANK, 8, requires_grad=True), torch.zeros(4, RANK, requires_grad=True)
    torch.autograd.backward(adapted(x, weight, None, a, b, SCALE).sum())
    assert x.grad is None
    assert b.grad is not None
    assert torch.equal(b.grad, torch.full((4, RANK), 2 * 8 * SCALE))


def test_rows_are_few_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    plain = torch.empty

    def watched(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bfloat16:
            seen.add(shape[0])
        return plain(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", watched)
    weight = torch.ones(4, 8).bfloat16()
    for rows in range(1, 400):
        x = torch.ones(rows, 8, requires_grad=True)
        torch.autograd.backward(frozen(x, weight, None).sum())
    assert seen == {32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448}
