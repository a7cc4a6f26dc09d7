"""Products in bfloat16: right to its precision, and of few shapes whatever the number of rows."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import linear

from agentd.trainer import blocks
from agentd.trainer.blocks import frozen


@pytest.mark.parametrize("shape", [(1, 7), (3, 21), (2, 64), (5, 40), (1, 0)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_narrow_product_and_its_gradient(shape: tuple[int, int], biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 96, generator=generator).requires_grad_()
    weight = torch.randn(33, 96, generator=generator) / 96**0.5
    bias = torch.randn(33, generator=generator) if biased else None
    slope = torch.randn(*shape, 33, generator=generator)
    expected = linear(x, weight, bias)
    (gradient,) = torch.autograd.grad(expected, x, slope)

    y = frozen(x, weight.bfloat16(), bias)
    assert (y.dtype, y.shape) == (torch.float32, expected.shape)
    (found,) = torch.autograd.grad(y, x, slope)
    if not x.numel():
        return
    # bfloat16 keeps 8 bits: 96 products of rounded factors are off by 2 % of their size at the most.
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    assert (found - gradient).abs().max() < 0.02 * gradient.abs().max()
    assert torch.cosine_similarity(found.flatten(), gradient.flatten(), 0) > 0.9999


def test_what_comes_out_may_be_added_to_in_place() -> None:
    x, weight = torch.ones(2, 3, 8, requires_grad=True), torch.ones(4, 8).bfloat16()
    y = frozen(x, weight, None)
    y.view(-1, 4).add_(1)
    torch.autograd.backward(y.sum())
    assert torch.equal(y, torch.full((2, 3, 4), 9.0))
    assert torch.equal(x.grad, torch.full((2, 3, 8), 4.0))  # type: ignore[arg-type]


def test_rows_are_few_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    plain = blocks._rounded

    def watched(x: torch.Tensor, dtype: torch.dtype, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def watch(rows: torch.Tensor) -> torch.Tensor:
            seen.add(len(rows))
            return multiply(rows)

        return plain(x, dtype, watch)

    monkeypatch.setattr(blocks, "_rounded", watched)
    weight = torch.ones(4, 8).bfloat16()
    for rows in range(1, 200):
        x = torch.ones(rows, 8, requires_grad=True)
        torch.autograd.backward(frozen(x, weight, None).sum())
    assert seen == {64, 128, 192, 256}


def test_no_gradient_is_computed_for_what_needs_none() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8).bfloat16()
    assert not frozen(x, weight, None).requires_grad
