"""Learning: the whole step, its cutoffs, the ledger, and the fp32 counterpart."""

import struct
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from agentd.int8 import sign_ledger
from agentd.int8.architecture import LENET5, Architecture, Conv, Flatten, GlobalMaxPool, Linear, MaxPool, ReLU
from agentd.int8.elastic import ElasticInt8, accuracy
from agentd.int8.floating import FloatNetwork
from agentd.int8.network import Int8Network
from agentd.int8.noise import Noise
from agentd.int8.sign_ledger import SignLedger, SignStep, decode, encode
from agentd.int8.tensor import Int8Tensor, quantise
from agentd.int8.weights import quantised
from tools import elastic_float
from tools.elastic_float import ElasticFloat

BARS = Architecture(
    "bars", (1, 12, 12), (Conv(4, 5, padding=2), ReLU(), MaxPool(2), Flatten(), Linear(16), ReLU(), Linear(4))
)
CLOUDS = Architecture(
    "clouds", (32, 3), (Linear(16), ReLU(), Linear(32), ReLU(), GlobalMaxPool(), Linear(16), ReLU(), Linear(3))
)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=2)
def bars(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy bars in four directions: (n, 1, 12, 12) in [-1, 1] and their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 12, 12, generator=generator) * 0.25 - 0.4
    labels = torch.randint(0, 4, (n,), generator=generator)
    places = torch.randint(3, 9, (n,), generator=generator)
    for i, (label, place) in enumerate(zip(labels.tolist(), places.tolist(), strict=True)):
        if label == 0:
            x[i, 0, place] += 1
        elif label == 1:
            x[i, 0, :, place] += 1
        else:
            eye = torch.eye(12).roll(place - 6, 1)
            x[i, 0] += eye if label == 2 else eye.flip(0)
    return x.clamp(-1, 1), labels


def clouds(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points on a sphere, a cube and a rod: (n, 32, 3) and their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 32, 3, generator=generator)
    labels = torch.arange(n) % 3
    x[labels == 0] /= x[labels == 0].norm(dim=2, keepdim=True)
    x[labels == 1] /= x[labels == 1].abs().amax(2, keepdim=True)
    x[labels == 2] = x[labels == 2].clamp(-1, 1) * torch.tensor([1.0, 0.15, 0.15])
    return x, labels


def train_int8(architecture: Architecture, data: tuple[Tensor, Tensor], bp_layers: int, steps: int, seed: int) -> float:
    network = quantised(FloatNetwork.initialised(architecture, seed))
    run = ElasticInt8(network, bp_layers, Noise(15, 128))
    x, labels = quantise(data[0][:-500], -7), data[1][:-500]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = torch.randint(0, len(labels), (64,), generator=generator)
        bits = (4, 3, 2)[3 * step // steps]
        run.step(x[batch], labels[batch], 1000 * seed + step, zo_bits=bits - 3, bp_bits=bits)
    right, n = accuracy(network, quantise(data[0][-500:], -7), data[1][-500:])
    return right / n


@pytest.mark.slow
def test_bp_in_integers_learns_images() -> None:
    assert train_int8(BARS, bars(2500, 0), 3, 150, 1) > 0.9


@pytest.mark.slow
def test_bp_in_integers_learns_point_sets() -> None:
    assert train_int8(CLOUDS, clouds(2500, 0), 4, 150, 1) > 0.9


@pytest.mark.slow
def test_elastic_learns_more_than_zo_alone() -> None:
    zo = train_int8(BARS, bars(2500, 0), 0, 200, 1)
    elastic = train_int8(BARS, bars(2500, 0), 2, 200, 1)
    assert elastic > zo + 0.052
    assert elastic > 0.8


@pytest.mark.slow
def test_zo_alone_learns() -> None:
    assert train_int8(BARS, bars(2500, 0), 0, 500, 1) > 0.4  # chance is 0.25


def test_the_layers_below_the_cutoff_learn_by_signs_alone() -> None:
    network = quantised(FloatNetwork.initialised(BARS, 0))
    start = network.copy()
    run = ElasticInt8(network, 1)
    x, labels = bars(64, 1)
    result = run.step(quantise(x), labels, 5)
    again = start.copy()
    ElasticInt8(again, 1).update_zo(5, result.sign, 1)
    for a, b, c, described in zip(
        network.parameters, again.parameters, start.parameters, network.described, strict=True
    ):
        below = described.layer < run.cutoff
        assert torch.equal(a.mantissa, b.mantissa) == below
        assert a.exponent == c.exponent


def test_an_even_loss_updates_nothing() -> None:
    # Weights of zero at the end: both losses are log2 of 4 classes.
    network = quantised(FloatNetwork.initialised(BARS, 0))
    for p in network.parameters[4:]:
        p.mantissa.zero_()
    start = network.copy()
    x, labels = bars(64, 1)
    run = ElasticInt8(network, 0, Noise(1, 1))
    network.parameters[-2] = Int8Tensor(network.parameters[-2].mantissa, -2000)
    network.parameters[-1] = Int8Tensor(network.parameters[-1].mantissa, -2000)
    result = run.step(quantise(x), labels, 5)
    assert result.sign == 0
    assert result.loss_plus == result.loss_minus == 64 * (2 << 16)
    for a, b in zip(network.parameters, start.parameters, strict=True):
        assert torch.equal(a.mantissa, b.mantissa)


@pytest.mark.parametrize("bp_layers", [0, 1])
def test_replay_makes_the_same_weights_bit_for_bit(bp_layers: int) -> None:
    network = quantised(FloatNetwork.initialised(LENET5, 0))
    start = network.copy()
    noise = Noise(31, 200)
    run = ElasticInt8(network, bp_layers, noise)
    x = quantise(torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    written = SignLedger(7, noise, bp_layers)
    for step in range(12):
        bits = 5 - step // 2
        result = run.step(x, torch.arange(8), (1 << 63) + step, zo_bits=bits)
        written.steps.append(SignStep((1 << 63) + step, result.sign, bits))
    assert {step.sign for step in written.steps} >= {1, -1}
    sign_ledger.replay(decode(encode(written)), start)
    same = [torch.equal(a.mantissa, b.mantissa) for a, b in zip(network.parameters, start.parameters, strict=True)]
    assert same == [described.layer < run.cutoff for described in network.described]
    written.steps[3] = SignStep(written.steps[3].seed, -written.steps[3].sign, written.steps[3].bits)
    other = Int8Network(LENET5, quantised(FloatNetwork.initialised(LENET5, 0)).parameters)
    sign_ledger.replay(written, other)
    assert not torch.equal(other.parameters[0].mantissa, network.parameters[0].mantissa)


def some_ledger(n: int = 5) -> SignLedger:
    return SignLedger(41, Noise(9, 100), 2, [SignStep(i * 12345678901, i % 3 - 1, 3 - i) for i in range(n)])


def test_a_ledger_costs_ten_bytes_a_step_and_does_not_drift() -> None:
    assert decode(encode(some_ledger())) == some_ledger()
    assert len(encode(some_ledger(6))) - len(encode(some_ledger(5))) == 10
    golden = (
        "4147454e54444938" "01000000" "0300000000000000" "0f00" "8000" "01000000" "0100000000000000"
        "2a00000000000000" "ff" "fe"
    )  # fmt: skip
    assert encode(SignLedger(3, Noise(15, 128), 1, [SignStep(42, -1, -2)]))[:-4].hex() == golden


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"AGENTDZO" + data[8:], "does not begin with AGENTDI8"),
        (lambda data: data[:20], "cut short: 20 of the 36 bytes"),
        (lambda data: data[:-3], "cut short or damaged"),
        (lambda data: data[:8] + struct.pack("<I", 9) + data[12:], "format version 9"),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "checksum"),
    ],
)
def test_a_damaged_ledger_is_refused(damage: object, message: str) -> None:
    assert callable(damage)
    with pytest.raises(ValueError, match=message):
        decode(damage(encode(some_ledger())))


@pytest.mark.parametrize("step", [(-1, 1, 0), (1 << 64, 1, 0), (1, 2, 0), (1, 1, 200)])
def test_an_impossible_step_is_refused(step: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="seed"):
        SignStep(*step)


@pytest.mark.parametrize("noise", [(0, 128), (64, 128), (15, 0), (15, 257)])
def test_impossible_noise_is_refused(noise: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"r_max|density"):
        Noise(*noise)


def test_elastic_fp32_has_the_same_split() -> None:
    model = FloatNetwork.initialised(BARS, 0)
    start = model.copy()
    x, labels = bars(64, 1)
    run = ElasticFloat(model, 1, epsilon=1e-2)
    result = run.step(x, labels, 5, lr_zo=0.0, lr_bp=0.1)
    for a, b, described in zip(model.parameters, start.parameters, model.described, strict=True):
        # Restored to rounding below the cutoff, moved above it.
        assert torch.allclose(a, b, atol=1e-6) == (described.layer < run.cutoff)
    assert result.projected_gradient == pytest.approx((result.loss_plus - result.loss_minus) / 2e-2)


def test_the_fp32_projected_gradient_is_the_directional_derivative() -> None:
    model = FloatNetwork.initialised(BARS, 0)
    x, labels = bars(64, 1)
    run = ElasticFloat(model, 0, epsilon=1e-3)
    start = model.copy()
    run.shift(9, 1.0)
    z = [a - b for a, b in zip(model.parameters, start.parameters, strict=True)]
    learning = [p.requires_grad_() for p in start.parameters]
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(start.forward(x), labels), learning)
    expected = sum(float((a * b).sum()) for a, b in zip(z, gradients, strict=True))
    got = ElasticFloat(FloatNetwork.initialised(BARS, 0), 0, epsilon=1e-3).step(x, labels, 9, lr_zo=0.0, lr_bp=0.0)
    assert got.projected_gradient == pytest.approx(expected, rel=0.05, abs=0.02)


def test_bp_in_fp32_learns() -> None:
    model = FloatNetwork.initialised(BARS, 1)
    x, labels = bars(2500, 0)
    run = ElasticFloat(model, 3)
    for step in range(150):
        batch = torch.randint(0, 2000, (64,), generator=torch.Generator().manual_seed(step))
        run.step(x[batch], labels[batch], step, lr_zo=0.0, lr_bp=0.1)
    right, n = elastic_float.accuracy(model, x[-500:], labels[-500:])
    assert right / n > 0.9
    right, n = accuracy(quantised(model, x[:100]), quantise(x[-500:], -7), labels[-500:])
    assert right / n > 0.9
