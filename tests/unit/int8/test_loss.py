import math

import pytest
import torch

from agentd.int8 import loss
from agentd.int8.tensor import Int8Tensor


def logits(seed: int, n: int, classes: int, exponent: int) -> Int8Tensor:
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(-127, 128, (n, classes), dtype=torch.int8, generator=generator)
    return Int8Tensor(mantissa, exponent)


@pytest.mark.parametrize("exponent", [-9, -7, -5, -4, -3])
@pytest.mark.parametrize("classes", [2, 10, 40])
def test_the_integer_loss_is_near_the_float_loss(exponent: int, classes: int) -> None:
    o, labels = logits(1, 500, classes, exponent), torch.arange(500) % classes
    exact = torch.nn.functional.cross_entropy(o.mantissa.double() * 2.0**exponent, labels, reduction="none")
    got = loss.cross_entropies(o, labels).double() / 65536 * math.log(2)
    # 47274 / 2**15 is log2 e to 5e-6.
    assert float(((got - exact).abs() - 1e-5 * exact).max()) < 1e-4


@pytest.mark.parametrize("exponent", [-9, -6, -4])
@pytest.mark.parametrize("other", [0, 1])
def test_the_sign_of_a_difference_agrees_with_float(exponent: int, other: int) -> None:
    # Two passes whose logits differ a little and whose exponents may differ.
    agree = total = 0
    for trial in range(200):
        generator = torch.Generator().manual_seed(trial)
        value = torch.randn(64, 10, generator=generator) * 40
        moved = value + torch.randn(64, 10, generator=generator) * 6
        labels = torch.randint(0, 10, (64,), generator=generator)
        first = Int8Tensor(value.round().clamp(-127, 127).to(torch.int8), exponent)
        second = Int8Tensor((moved / 2**other).round().clamp(-127, 127).to(torch.int8), exponent + other)
        difference = loss.cross_entropy(first, labels) - loss.cross_entropy(second, labels)
        exact = [
            float(torch.nn.functional.cross_entropy(t.mantissa.double() * 2.0**t.exponent, labels))
            for t in (first, second)
        ]
        agree += (difference > 0) == (exact[0] > exact[1])
        total += 1
    assert agree / total >= 0.98


@pytest.mark.parametrize("exponent", [-2000, -60, 60, 2000])
def test_extreme_exponents_give_the_limits(exponent: int) -> None:
    o, labels = logits(2, 50, 8, exponent), torch.arange(50) % 8
    losses = loss.cross_entropies(o, labels)
    if exponent < 0:
        assert set(losses.tolist()) == {3 << 16}  # log2 of 8 classes
    else:
        best = o.mantissa == o.mantissa.amax(1, keepdim=True)
        right = best.gather(1, labels[:, None]).squeeze(1)
        assert int(losses[~right].min()) >= 128 << 16  # as far down as it goes
        assert int(losses[right].max()) <= 2 << 16  # ties share
    assert int(losses.min()) >= 0


def test_the_gradient_is_softmax_less_one_hot() -> None:
    o, labels = logits(3, 200, 10, -5), torch.arange(200) % 10
    exact = torch.softmax(o.mantissa.double() / 32, 1) - torch.nn.functional.one_hot(labels, 10)
    got = loss.gradient(o, labels)
    assert float((got.mantissa.double() * 2.0**got.exponent - exact).abs().max()) < 0.05
    assert int(got.mantissa.to(torch.int64).abs().max()) >= 64
