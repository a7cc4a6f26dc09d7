"""Integer-only, and no overflow: properties over random tensors and exponents, extremes included."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from agentd.int8 import kernels, loss, rounding, tensor, window
from agentd.int8 import noise as noises
from agentd.int8.architecture import LENET5, Architecture, BatchNorm, Conv, GlobalMaxPool, Linear, ReLU
from agentd.int8.elastic import ElasticInt8
from agentd.int8.floating import FloatNetwork
from agentd.int8.network import Int8Network
from agentd.int8.noise import Noise
from agentd.int8.tensor import Int8Tensor
from agentd.int8.weights import quantised

POINTS = Architecture(
    "points",
    (24, 3),
    (Linear(8, bias=False), BatchNorm(), ReLU(), Linear(16), GlobalMaxPool(), Linear(12), ReLU(), Linear(4)),
)
STRIDED = Architecture("strided", (3, 11, 9), (Conv(4, 3, stride=2, padding=1), ReLU(), GlobalMaxPool(), Linear(3)))


SOURCES = str(Path(noises.__file__).parent)


class IntegersOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Raises on any of torch's operations that takes or gives a floating-point number, as a tensor or as a scalar, and
    on any variable of agentd.int8 that holds one, which covers NumPy and Python's own arithmetic."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.operations = self.variables = 0

    def __enter__(self) -> "IntegersOnly":
        super().__enter__()  # type: ignore[no-untyped-call]  # likewise
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(None)
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # likewise

    def _trace(self, frame: FrameType, event: str, result: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        for value in (*frame.f_locals.values(), result if event == "return" else None):
            self.variables += 1
            if isinstance(value, (float, complex, np.inexact)) or (
                isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.inexact)
            ):
                raise AssertionError(f"{frame.f_code.co_name}, line {frame.f_lineno}, has the floating-point {value!r}")
        return self._trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for value in tree_flatten((args, kwargs or {}, result))[0]:
            if isinstance(value, (float, complex)) or (
                isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            ):
                raise AssertionError(f"{func} has the floating-point operand {value}")
        return result


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def mantissas(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def random_network(architecture: Architecture, seed: int, exponents: Callable[[], int]) -> Int8Network:
    generator = torch.Generator().manual_seed(seed)
    tensors = [Int8Tensor(mantissas(generator, *p.shape), exponents()) for p in architecture.parameters()]
    return Int8Network(architecture, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("bp_layers", [0, 1, 3, 5])
def test_a_lenet_step_makes_no_float(bp_layers: int) -> None:
    network = quantised(FloatNetwork.initialised(LENET5, 0))
    before = [p.mantissa.clone() for p in network.parameters]
    generator = torch.Generator().manual_seed(1)
    x, labels = Int8Tensor(mantissas(generator, 16, 1, 28, 28), -7), torch.arange(16) % 10
    run = ElasticInt8(network, bp_layers)
    with IntegersOnly() as watched:
        result = run.step(x, labels, seed=2, zo_bits=3, bp_bits=5)
    assert watched.operations > 50
    assert watched.variables > 1000
    assert result.sign != 0 or bp_layers == 5
    changed = [not torch.equal(a, b.mantissa) for a, b in zip(before, network.parameters, strict=True)]
    assert all(changed[::2])  # every weight; a bias may be unlucky


@pytest.mark.parametrize("architecture", [POINTS, STRIDED], ids=lambda a: a.name)
@pytest.mark.parametrize("bp_layers", [0, 2])
def test_other_layers_make_no_float(architecture: Architecture, bp_layers: int) -> None:
    network = quantised(FloatNetwork.initialised(architecture, 0))
    x = Int8Tensor(mantissas(torch.Generator().manual_seed(1), 6, *architecture.input), -7)
    full = ElasticInt8(network, len(architecture.trained_layers()))
    with IntegersOnly():
        ElasticInt8(network, bp_layers).step(x, torch.arange(6) % architecture.classes, seed=2)
        full.step(x, torch.arange(6) % architecture.classes, seed=2)


def test_the_watch_would_see_a_float() -> None:
    with pytest.raises(AssertionError, match="floating-point"), IntegersOnly():
        torch.ones(3, dtype=torch.int8) * 0.5
    with pytest.raises(AssertionError, match="floating-point"), IntegersOnly():
        torch.ones(3, dtype=torch.int8).to(torch.float32)
    for deed in (lambda: tensor.exponent_for(0.5), lambda: noises._clipped(np.ones(3, np.float32))):
        with pytest.raises(AssertionError, match="has the floating-point"), IntegersOnly():
            deed()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("architecture", [POINTS, STRIDED], ids=lambda a: a.name)
def test_no_exponents_and_mantissas_overflow(architecture: Architecture, seed: int) -> None:
    # The same arithmetic on 64-bit accumulators must agree wherever it is compared: see the float check below.
    exponents = random.Random(seed)
    spread = (7, 40, 2000)[seed % 3]
    network = random_network(architecture, seed, lambda: exponents.randint(-spread, spread))
    if seed == 5:  # all at the rim
        for p in network.parameters:
            p.mantissa.fill_(127)
    generator = torch.Generator().manual_seed(seed)
    x = Int8Tensor(mantissas(generator, 9, *architecture.input), exponents.randint(-spread, spread))
    labels = torch.randint(0, architecture.classes, (9,), generator=generator)
    run = ElasticInt8(network, exponents.randint(0, len(architecture.trained_layers())), Noise(63, 256))
    for step in range(3):
        logits, activations = network.forward(x, record_from=0)
        loss_now = loss.cross_entropy(logits, labels)
        assert 0 <= loss_now <= 9 * (140 << 16)
        for activation in activations:
            assert int(activation.y.mantissa.to(torch.int64).abs().max()) <= 127
        run.step(x, labels, step, zo_bits=7, bp_bits=9)
        for p in network.parameters:
            assert p.mantissa.dtype == torch.int8
            assert int(p.mantissa.to(torch.int64).abs().max()) <= 127


def test_the_longest_sum_fits_with_bias_and_rounding() -> None:
    k = window.MAX_TERMS
    x = torch.full((2, k), 127, dtype=torch.int8)
    layer = Architecture("long", (k,), (Linear(2),))
    for sign in (1, -1):
        weight = torch.full((2, k), 127 * sign, dtype=torch.int8)
        bias = torch.full((2,), 127 * sign, dtype=torch.int8)
        network = Int8Network(layer, [Int8Tensor(weight, 0), Int8Tensor(bias, 500)])
        logits, _ = network.forward(Int8Tensor(x, 0))
        # 2**30 from the clipped bias and a little less from the sum: 31 bits, so a shift of 24 and 127 after it.
        assert set(logits.mantissa.flatten().tolist()) == {sign * 127}
        assert logits.exponent == 24
        assert (k * 127 * 127 + (1 << 30) + (1 << 23)) < 1 << 31


@pytest.mark.parametrize("shift", [0, 1, 2, 7, 8, 23])
def test_rounding_is_by_magnitude(shift: int) -> None:
    generator = torch.Generator().manual_seed(shift)
    values = torch.randint(-(1 << 30), 1 << 30, (4000,), generator=generator)
    values[:6] = torch.tensor([0, 1, -1, 1 << 30, -(1 << 30), 128])
    half = (1 << shift) >> 1
    expected = [(abs(v) + half >> shift) * (1 if v >= 0 else -1) for v in values.tolist()]
    for dtype in (torch.int64, torch.int32):
        assert rounding.shift_nearest(values.to(dtype, copy=True), shift).tolist() == expected
    stochastic = rounding.shift_stochastic(values, shift).tolist()
    floors = [(abs(v) >> shift) for v in values.tolist()]
    assert all(abs(s) - f in (0, 1) for s, f in zip(stochastic, floors, strict=True))
    assert all(s * v >= 0 for s, v in zip(stochastic, values.tolist(), strict=True))


@pytest.mark.parametrize("shift", [4, 9, 12, 20])
def test_stochastic_rounding_keeps_the_mean(shift: int) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 20 << shift, (200_000,), generator=generator)
    rounded = rounding.shift_stochastic(values, shift)
    exact, got = int(values.sum()) / (1 << shift), int(rounded.sum())
    # The lower half of the bits is spent on the dice: the mean is short of half their weight.
    assert abs(got - exact) / len(values) < 0.6 / (1 << shift // 2)
    # and it is not plain rounding
    assert not torch.equal(rounded, rounding.shift_nearest(values.clone(), shift))


def test_requantising_at_128_does_not_wrap() -> None:
    for top in (127, 128, 129, 255, 256, (1 << 31) - (1 << 24)):
        values = torch.tensor([top, -top, 0, 1], dtype=torch.int32)
        tensor = rounding.requantise(values.clone(), -3)
        shift = max(0, top.bit_length() - 7)
        expected = min(127, (top + ((1 << shift) >> 1)) >> shift)
        assert tensor.mantissa.tolist()[:2] == [expected, -expected]
        assert tensor.exponent == shift - 3


def test_long_gradient_sums_are_taken_in_64_bits() -> None:
    rows = 3 * window.MAX_TERMS + 5
    full = torch.full((rows, 2), 127, dtype=torch.int8)
    assert set(kernels.outer(full, -full).flatten().tolist()) == {-rows * 127 * 127}  # more than 32 bits hold


@pytest.mark.parametrize("r_max", [1, 3, 15, 63])
@pytest.mark.parametrize("density", [16, 128, 256])
def test_directions_are_symmetric_uniform_and_sparse(r_max: int, density: int) -> None:
    z = noises.direction(7, 3, (120_000,), Noise(r_max, density)).to(torch.int64)
    assert int(z.min()) == -r_max
    assert int(z.max()) == r_max
    assert abs(z.double().mean()) < 4 * float(z.double().std()) / 120_000**0.5
    share = density / 256 * (1 - 1 / (2 * r_max + 1))
    assert abs(float((z != 0).double().mean()) - share) < 0.02 * (1 + (r_max == 63)) * max(share, 0.3)


def test_directions_depend_on_seed_and_tensor_alone() -> None:
    noise = Noise()
    z = noises.direction(7, 3, (40, 25), noise)
    assert torch.equal(z, noises.direction(7, 3, (40, 25), noise))
    assert torch.equal(z.flatten()[:321], noises.direction(7, 3, (321,), noise))
    assert not torch.equal(z, noises.direction(8, 3, (40, 25), noise))
    assert not torch.equal(z, noises.direction(7, 4, (40, 25), noise))
    # Part of the ledger's meaning: these values must never change.
    assert noises.direction(1, 2, (12,), noise).tolist() == [-2, 6, -7, -6, 14, 0, 0, -4, 0, 0, 2, -14]


@pytest.mark.parametrize("bits", [4, 1, 0, -2])
def test_an_update_has_the_mean_that_its_bits_say(bits: int) -> None:
    noise = Noise(15, 256)
    weight = torch.zeros(100_000, dtype=torch.int8)
    noises.descend(weight, 5, 0, noise, 1, bits)
    z = noises.direction(5, 0, (100_000,), noise).double()
    scale = 2.0 ** (bits - 4)
    assert torch.allclose((weight.double() * z).mean(), -scale * (z * z).mean(), rtol=0.05)
    if bits == 4:
        assert torch.equal(weight.double(), -z)


def test_a_perturbation_leaves_the_weight_alone_at_the_rim() -> None:
    weight = torch.tensor([126, -126, 127, 0], dtype=torch.int8)
    z = torch.tensor([3, 3, -3, 5], dtype=torch.int8)
    original = weight.clone()
    assert noises.perturbed(weight, z, 1).tolist() == [127, -123, 124, 5]
    assert noises.perturbed(weight, z, -1).tolist() == [123, -127, 127, -5]
    assert torch.equal(weight, original)


def test_the_products_fall_back_to_int32_where_int8_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = mantissas(generator, 40, 300), mantissas(generator, 300, 7)
    fast = kernels.matmul(a, b)
    monkeypatch.setattr(kernels, "int8_products_are_exact", lambda: False)
    out = torch.empty(40, 7, dtype=torch.int32)
    assert torch.equal(kernels.matmul(a, b, out), fast)
    assert torch.equal(out, a.to(torch.int32) @ b.to(torch.int32))
