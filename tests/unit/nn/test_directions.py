import numpy as np
import pytest
import torch
from torch import Tensor

from agentd.learn.philox import rademacher
from agentd.learn.update_rule import DISTRIBUTIONS
from agentd.nn import stochastic_rounding
from agentd.nn.directions import Direction

CPU = torch.device("cpu")


def piece(distribution: str, start: int, n: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return Direction(distribution).piece(7, 3, start, n, dtype, CPU, scale)


def test_signs_are_those_of_rademacher() -> None:
    assert np.array_equal(piece("rademacher", 0, 1000).numpy(), rademacher(7, 3, 1000))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_piece_can_be_made_alone(distribution: str, dtype: torch.dtype) -> None:
    whole = piece(distribution, 0, 3000, dtype)
    for start, n in ((0, 1), (1, 1), (5, 300), (255, 2), (256, 256), (999, 2001), (2999, 1)):
        assert torch.equal(piece(distribution, start, n, dtype), whole[start : start + n])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("width", [24, 12])
def test_rows_are_those_of_the_whole(distribution: str, width: int) -> None:
    whole = piece(distribution, 0, 50 * width).view(50, width)
    rows = torch.tensor([3, 4, 49, 0])
    assert torch.equal(Direction(distribution).rows(7, 3, rows, width, torch.float32, CPU), whole[rows])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_0_variance_1_and_no_correlation(distribution: str) -> None:
    n = 1 << 17
    direction = Direction(distribution)
    z = torch.stack([direction.piece(seed, tensor, 0, n, torch.float32, CPU) for seed in (0, 1) for tensor in (0, 1)])
    products = (z @ z.T / n - torch.eye(4)).abs()
    assert float(products.max()) < 5 * 2**0.5 / n**0.5
    assert float(z.mean(1).abs().max()) < 5 / n**0.5


def test_gaussian_entries_have_the_normal_distribution() -> None:
    z = piece("gaussian", 0, 1 << 17).sort().values
    normal = torch.distributions.Normal(0.0, 1.0).cdf(z)  # type: ignore[no-untyped-call]
    empirical = torch.arange(1, len(z) + 1) / len(z)
    assert float((normal - empirical).abs().max()) < 1.63 / len(z) ** 0.5  # Kolmogorov-Smirnov at 1 %


def test_keys_out_of_range() -> None:
    with pytest.raises(ValueError, match="unsigned 64-bit"):
        Direction("rademacher").piece(-1, 0, 0, 1, torch.float32, CPU)


def test_rounding_is_unbiased_and_its_errors_do_not_correlate() -> None:
    n = 3 * stochastic_rounding.BLOCK + 1000
    errors = []
    for seed in (0, 1):
        weight = torch.full((n,), 1.0, dtype=torch.bfloat16)
        stochastic_rounding.add(weight, 0, torch.full((n,), 0.3 * 2**-7), seed, 2)
        moved = (weight.float() - 1.0) * 2**7
        assert set(moved.tolist()) == {0.0, 1.0}
        assert float(moved.mean()) == pytest.approx(0.3, abs=5 * (0.21 / n) ** 0.5)
        errors.append(moved - 0.3)
    blocks = [errors[0][i * stochastic_rounding.BLOCK : (i + 1) * stochastic_rounding.BLOCK] for i in range(3)]
    pairs = [(errors[0], errors[1]), (blocks[0], blocks[1]), (blocks[0], blocks[2]), (errors[0][:-1], errors[0][1:])]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 5 * 0.21 / len(one) ** 0.5


def test_rounding_does_not_depend_on_the_pieces() -> None:
    n = 2 * stochastic_rounding.BLOCK + 77
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    delta = 1e-4 * torch.ones(n)
    whole, parts = weight.clone(), weight.clone()
    stochastic_rounding.add(whole, 0, delta.clone(), 5, 1)
    for start in range(0, n, stochastic_rounding.BLOCK):
        stochastic_rounding.add(parts, start, delta[start : start + stochastic_rounding.BLOCK].clone(), 5, 1)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, weight)


def test_what_rounding_refuses() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16"):
        stochastic_rounding.add(torch.zeros(4, dtype=torch.float16), 0, torch.zeros(4), 0, 0)
    with pytest.raises(ValueError, match="begins at a multiple"):
        stochastic_rounding.add(torch.zeros(400, dtype=torch.bfloat16), 100, torch.zeros(4), 0, 0)
