import numpy as np
import pytest

from agentd.learn.philox import rademacher

_M = (1 << 64) - 1


def philox4x64(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 written from the paper (Salmon et al. 2011), to hold NumPy's generator to."""
    x0, x1, x2, x3 = counter, 0, 0, 0
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = high >> 64 ^ x1 ^ k0, high & _M, low >> 64 ^ x3 ^ k1, low & _M
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & _M, k1 + 0xBB67AE8584CAA73B & _M
    return [x0, x1, x2, x3]


@pytest.mark.parametrize(("seed", "tensor"), [(0, 0), (7, 29), ((1 << 64) - 1, (1 << 64) - 1)])
def test_signs_are_the_bits_of_philox(seed: int, tensor: int) -> None:
    # NumPy counts up before it draws, so a generator started at counter 0 gives blocks 1, 2, ...
    words = philox4x64((seed, tensor), 1) + philox4x64((seed, tensor), 2)
    expected = [1.0 if word >> bit & 1 else -1.0 for word in words for bit in range(64)]
    assert rademacher(seed, tensor, 512).tolist() == expected


def test_entries_do_not_depend_on_how_many_are_asked_for() -> None:
    long = rademacher(3, 5, 1000)
    for n in (0, 1, 63, 64, 65, 576, 999):
        short = rademacher(3, 5, n)
        assert short.shape == (n,)
        assert short.dtype == np.float32
        assert np.array_equal(short, long[:n])


def test_directions_look_independent() -> None:
    n = 1 << 16
    directions = np.stack([rademacher(seed, tensor, n) for seed in range(4) for tensor in range(4)])
    assert set(np.unique(directions)) == {-1.0, 1.0}
    correlation = directions @ directions.T / n
    # 5 standard errors of a mean of n independent signs; also the means, against a constant direction
    assert np.abs(correlation - np.eye(16)).max() < 5 / n**0.5
    assert np.abs(directions.mean(axis=1)).max() < 5 / n**0.5


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (1 << 64, 0, 1), (0, -1, 1), (0, 1 << 64, 1), (0, 0, -1)])
def test_out_of_range(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"64-bit|cannot make"):
        rademacher(*arguments)
