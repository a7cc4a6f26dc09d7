"""Layers against float arithmetic, architectures as data, and errors that say what is wrong."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from agentd.int8 import kernels, layers, loss, step_memory
from agentd.int8.architecture import LENET5, POINTNET, Architecture, Conv, Flatten, Linear, MaxPool, ReLU
from agentd.int8.elastic import ElasticInt8, predict
from agentd.int8.floating import FloatNetwork
from agentd.int8.invalid import InvalidArchitecture, InvalidInput, InvalidLabels, InvalidWeights
from agentd.int8.network import Int8Network
from agentd.int8.tensor import Int8Tensor, dequantise, quantise
from agentd.int8.weights import quantised
from agentd.int8.window import Window


def mantissas(seed: int, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("channels", "out", "height", "width", "kernel", "stride", "padding"),
    [
        (1, 6, 28, 28, 5, 1, 2),
        (6, 16, 14, 14, 5, 1, 2),
        (3, 4, 9, 11, 3, 2, 1),
        (2, 3, 8, 8, 3, 2, 0),
        (2, 5, 7, 7, 1, 1, 0),
    ],
)
def test_convolutions_are_exact(
    channels: int, out: int, height: int, width: int, kernel: int, stride: int, padding: int
) -> None:
    x, weight = mantissas(1, 5, height, width, channels), mantissas(2, out, channels, kernel, kernel)
    window = Window(kernel, stride, padding)
    y = kernels.untile(kernels.convolve(x, weight, window))
    exact_x = x.movedim(-1, 1).double().requires_grad_()
    exact_w = weight.double().requires_grad_()
    exact = functional.conv2d(exact_x, exact_w, stride=stride, padding=padding)
    assert torch.equal(y.double(), exact.detach().movedim(1, -1))
    error = mantissas(3, *y.shape)
    by_x, by_w = torch.autograd.grad(exact, (exact_x, exact_w), error.movedim(-1, 1).double())
    assert torch.equal(kernels.weight_gradient(x, error, weight, window).double(), by_w)
    assert torch.equal(kernels.input_gradient(error, weight, window, height, width).double(), by_x.movedim(1, -1))


def test_a_convolution_goes_through_a_batch_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, window = mantissas(1, 7, 12, 12, 2), mantissas(2, 3, 2, 5, 5), Window(5, 1, 2)
    whole = kernels.convolve(x, weight, window), kernels.weight_gradient(x, mantissas(3, 7, 12, 12, 3), weight, window)
    monkeypatch.setattr(kernels, "_PATCH_BYTES", 3000)
    parts = kernels.convolve(x, weight, window), kernels.weight_gradient(x, mantissas(3, 7, 12, 12, 3), weight, window)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_pooling_matches_torch_both_ways() -> None:
    x = mantissas(1, 4, 9, 7, 3)
    y = layers.forward(MaxPool(2), [], Int8Tensor(x, 0))
    exact = x.movedim(-1, 1).double().requires_grad_()
    pooled = functional.max_pool2d(exact, 2)
    assert torch.equal(y.mantissa.double(), pooled.detach().movedim(1, -1))
    error = Int8Tensor(mantissas(2, *y.shape), 0)
    back = layers.backward(MaxPool(2), [], Int8Tensor(x, 0), y, error)
    (expected,) = torch.autograd.grad(pooled, exact, error.mantissa.movedim(-1, 1).double())
    assert torch.equal(back.mantissa.double(), expected.movedim(1, -1))


@pytest.mark.parametrize("architecture", [LENET5, POINTNET], ids=lambda a: a.name)
def test_fusing_changes_nothing(architecture: Architecture) -> None:
    network = quantised(FloatNetwork.initialised(architecture, 0))
    x = Int8Tensor(mantissas(1, 3, *architecture.input), -7)
    fused, nothing = network.forward(x)
    plain, activations = network.forward(x, record_from=0)
    assert torch.equal(fused.mantissa, plain.mantissa)
    assert fused.exponent == plain.exponent
    assert not nothing
    assert len(activations) == len(architecture.layers)


@pytest.mark.parametrize("architecture", [LENET5, POINTNET], ids=lambda a: a.name)
def test_the_integers_follow_the_float_network(architecture: Architecture) -> None:
    model = FloatNetwork.initialised(architecture, 3)
    x = torch.rand(16, *architecture.input, generator=torch.Generator().manual_seed(4)) * 2 - 1
    network = quantised(model)
    exact = model.forward(x)
    got = dequantise(network.forward(quantise(x))[0])
    deviation = float((got - exact).norm() / exact.norm())
    assert deviation < 0.1


def test_gradients_follow_autograd() -> None:
    model = FloatNetwork.initialised(LENET5, 5)
    x = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(6)) * 2 - 1
    labels = torch.arange(32) % 10
    network = quantised(model)
    logits, activations = network.forward(quantise(x), record_from=0)
    exact = [p.requires_grad_() for p in model.parameters]
    expected = torch.autograd.grad(functional.cross_entropy(model.forward(x), labels), exact)
    seen = 0
    for parameter, gradient in network.backward(activations, loss.gradient(logits, labels)):
        a, b = gradient.double().flatten(), expected[parameter.index].double().flatten()
        assert float(a @ b / (a.norm() * b.norm())) > 0.9, parameter.name
        seen += 1
    assert seen == 10


def test_the_sizes_are_the_papers() -> None:
    assert LENET5.size == 107_786
    assert POINTNET.size == 816_744
    assert step_memory.outputs(LENET5) == 18_058
    assert step_memory.accumulators(LENET5) == 8_054


@pytest.mark.parametrize(("batch", "fp32", "int8", "ratio"), [(32, 2.743, 1.717, 1.60), (256, 18.92, 12.98, 1.46)])
def test_the_memory_model_gives_the_papers_ranges(batch: int, fp32: float, int8: float, ratio: float) -> None:
    of_fp32 = step_memory.step_bytes(LENET5, batch, 0, int8=False)
    of_int8 = step_memory.step_bytes(LENET5, batch, 0, int8=True)
    assert round(of_fp32 / 1e6, 3 if batch == 32 else 2) == fp32
    assert round(of_int8 / 1e6, 3 if batch == 32 else 2) == int8
    assert round(of_fp32 / of_int8, 2) == ratio
    overhead = step_memory.step_bytes(LENET5, batch, 1, int8=False) / of_fp32 - 1
    assert overhead < 0.017
    if batch == 256:
        assert round(100 * overhead, 3) == 0.072


@pytest.mark.parametrize("architecture", [LENET5, POINTNET], ids=lambda a: a.name)
def test_an_architecture_is_data(architecture: Architecture) -> None:
    assert Architecture.parse(architecture.as_dict()) == architecture


def test_short_forms_are_understood() -> None:
    data = {
        "name": "tiny",
        "input": [1, 8, 8],
        "layers": [{"conv": {"out": 2, "kernel": 3}}, "relu", {"max_pool": 2}, "flatten", {"linear": 3}],
    }
    assert Architecture.parse(data).layers == (Conv(2, 3), ReLU(), MaxPool(2), Flatten(), Linear(3))
    assert [p.name for p in Architecture.parse(data).parameters()] == [
        "conv1.weight", "conv1.bias", "fc1.weight", "fc1.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers_", "message"),
    [
        ([], "it has no layers"),
        (["relu"], "it ends with shape"),
        (["flatten"], "nothing to learn"),
        ([{"dense": 10}], "layer 1: unknown kind 'dense'; known are conv"),
        (["flatten", {"linear": 0}], "layer 2: out must be at least 1"),
        (["flatten", {"linear": "10"}], "layer 2: linear.out must be int, not '10'"),
        (["flatten", {"linear": {"width": 10}}], "layer 2: linear has no option 'width'"),
        (["flatten", "linear"], "layer 2: linear: missing 1 required"),
        ([{"linear": 10}], "layer 1: flatten the image first"),
        ([{"conv": {"out": 2, "kernel": 40}}], "larger than the padded image"),
        ([{"conv": {"out": 2, "kernel": 3, "padding": 3}}], "padding must be"),
        (["flatten", {"linear": 70_000}, {"linear": 10}], "a sum may have 65536 terms"),
        ([7], "7 is neither a name"),
    ],
)
def test_an_impossible_architecture_says_why(layers_: list[object], message: str) -> None:
    with pytest.raises(InvalidArchitecture) as caught:
        Architecture.parse({"name": "net", "input": [1, 8, 8], "layers": layers_})
    assert message in str(caught.value)
    assert "'net'" in str(caught.value)


def test_cutoffs_go_from_full_zo_to_full_bp() -> None:
    assert [LENET5.cutoff(n) for n in range(6)] == [12, 11, 9, 7, 3, 0]
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match="5 layers to train"):
            LENET5.cutoff(wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
        (torch.tensor([1.0, float("-inf")]), "NaN or infinite"),
        (torch.tensor([1, 2]), "floating-point values are quantised, and these are int64"),
        (torch.zeros(0, 3), "no entries"),
    ],
)
def test_what_cannot_be_quantised_is_refused(values: Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        quantise(values)


@pytest.mark.parametrize("exponent", [-160, -130, -40, -7, 0, 30, 110])
def test_quantising_is_the_nearest_and_the_exponent_the_least(exponent: int) -> None:
    values = torch.tensor([-127.0, -3.4, 0.2, 64.0, 126.7], dtype=torch.float64) * 2.0**exponent
    tensor = quantise(values)
    assert tensor.exponent == exponent
    assert tensor.mantissa.tolist() == [-127, -3, 0, 64, 127]
    assert quantise(torch.zeros(3)).mantissa.tolist() == [0, 0, 0]
    assert quantise(torch.tensor([127.6 * 2.0**-7])).mantissa.tolist() == [64]  # 128 does not fit
    assert quantise(torch.tensor([5.0]), -7).mantissa.tolist() == [127]  # clipped


@pytest.mark.parametrize(
    ("x", "labels", "error", "message"),
    [
        (mantissas(0, 4, 28, 28), torch.zeros(4), InvalidInput, r"shape \(n, 1, 28, 28\)"),
        (mantissas(0, 0, 1, 28, 28), torch.zeros(0), InvalidInput, "n > 0"),
        (mantissas(0, 4, 1, 28, 28).to(torch.int32), torch.zeros(4).long(), InvalidInput, "int8, not int32"),
        (torch.full((2, 1, 28, 28), -128, dtype=torch.int8), torch.zeros(2).long(), InvalidInput, "-128"),
        (mantissas(0, 4, 1, 28, 28), torch.zeros(4), InvalidLabels, "class indices, not float32"),
        (mantissas(0, 4, 1, 28, 28), torch.zeros(3).long(), InvalidLabels, r"shape \(4,\), not \(3,\)"),
        (mantissas(0, 4, 1, 28, 28), torch.tensor([0, 9, 10, 1]), InvalidLabels, "label 10 is not one of the 10"),
        (mantissas(0, 4, 1, 28, 28), torch.tensor([0, -1, 1, 1]), InvalidLabels, "label -1"),
    ],
)
def test_a_bad_batch_changes_nothing(x: Tensor, labels: Tensor, error: type[ValueError], message: str) -> None:
    network = quantised(FloatNetwork.initialised(LENET5, 0))
    before = network.copy()
    with pytest.raises(error, match=message):
        ElasticInt8(network, 2).step(Int8Tensor(x, -7), labels, 1)
    for a, b in zip(before.parameters, network.parameters, strict=True):
        assert torch.equal(a.mantissa, b.mantissa)


def test_wrong_weights_are_named_all_at_once() -> None:
    parameters = quantised(FloatNetwork.initialised(LENET5, 0)).parameters
    with pytest.raises(InvalidWeights, match="10 tensors are needed, and 9 given"):
        Int8Network(LENET5, parameters[:-1])
    parameters[0] = Int8Tensor(parameters[0].mantissa[:5], 0)
    parameters[4] = Int8Tensor(parameters[4].mantissa.to(torch.int16), 0)
    with pytest.raises(InvalidWeights) as caught:
        Int8Network(LENET5, parameters)
    assert len(caught.value.problems) == 2
    assert "conv1.weight" in str(caught.value)
    assert "fc1.weight is int16 instead of int8" in str(caught.value)


def test_predictions_do_not_depend_on_how_a_set_is_cut_much() -> None:
    # The exponents follow the batch's largest sums, so single examples may differ; most must not.
    network = quantised(FloatNetwork.initialised(LENET5, 0))
    x = Int8Tensor(mantissas(2, 64, 1, 28, 28), -7)
    whole, parts = predict(network, x), predict(network, x, batch=7)
    assert int((whole == parts).sum()) >= 56
    with pytest.raises(InvalidInput):
        predict(network, Int8Tensor(mantissas(2, 3, 28, 28), -7))
