"""Weights in and out: safetensors, state dicts, quantisation with calibration."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agentd.int8.architecture import LENET5, POINTNET, Architecture, BatchNorm, Conv, Flatten, Linear, ReLU
from agentd.int8.floating import FloatNetwork
from agentd.int8.invalid import InvalidWeights
from agentd.int8.tensor import dequantise, quantise
from agentd.int8.weights import from_state, input_exponent, load_float, load_int8, quantised, save_int8

NORMED = Architecture("normed", (2, 6, 6), (Conv(3, 3), BatchNorm(), ReLU(), Flatten(), Linear(4)))


def test_an_int8_network_comes_back_whole(tmp_path: Path) -> None:
    network = quantised(FloatNetwork.initialised(LENET5, 0))
    save_int8(network, tmp_path / "net.safetensors")
    again = load_int8(tmp_path / "net.safetensors")
    assert again.architecture == LENET5
    for a, b in zip(network.parameters, again.parameters, strict=True):
        assert torch.equal(a.mantissa, b.mantissa)
        assert a.exponent == b.exponent


@pytest.mark.parametrize("architecture", [LENET5, POINTNET], ids=lambda a: a.name)
def test_a_state_dict_is_taken_by_name_or_by_order(architecture: Architecture, tmp_path: Path) -> None:
    model = FloatNetwork.initialised(architecture, 0)
    named = {p.name: t for p, t in zip(model.described, model.parameters, strict=True)}
    foreign = {f"features.{i:02}.{name.split('.')[1]}": t for i, (name, t) in enumerate(named.items())}
    save_file(named, tmp_path / "named.safetensors")
    for loaded in (load_float(architecture, tmp_path / "named.safetensors"), from_state(architecture, foreign)):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters, model.parameters, strict=True))


def test_a_torch_modules_weights_give_its_output() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 4)
    )
    x = torch.randn(40, 2, 6, 6)
    module(x * 3 + 1)  # so that the statistics are not trivial
    module.eval()
    model = from_state(NORMED, module.state_dict())
    exact = module(x).detach()
    assert torch.allclose(model.forward(x), exact, atol=1e-5)
    got = dequantise(quantised(model).forward(quantise(x))[0])
    assert float((got - exact).norm() / exact.norm()) < 0.05


def test_calibration_clips_outliers() -> None:
    model = FloatNetwork.initialised(LENET5, 0)
    model.parameters[4][0, 0] = 0.29  # far out: it takes three bits from all others
    x = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[:, :, 0, 0] = 0

    def deviation(calibration: torch.Tensor | None) -> float:
        exact = model.forward(x)
        return float((dequantise(quantised(model, calibration).forward(quantise(x))[0]) - exact).norm() / exact.norm())

    assert deviation(x[:32]) < deviation(None)
    assert input_exponent(x.clamp(-1, 1)) == input_exponent(x.clamp(-0.99, 0.99)) == -7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc1.bias"), "it has 9 weights and biases, and 10 are needed"),
        (lambda s: s.update({"fc1.bias": torch.zeros(7)}), r"fc1.bias has shape \(7,\) instead of \(120,\)"),
        (lambda s: s.update({"fc1.bias": torch.zeros(120, dtype=torch.int32)}), "fc1.bias is int32"),
        (lambda s: s.update({"fc1.bias": torch.full((120,), float("nan"))}), "fc1.bias has entries that are NaN"),
    ],
)
def test_a_state_that_does_not_fit_says_why(change: object, message: str) -> None:
    model = FloatNetwork.initialised(LENET5, 0)
    state = {p.name: t for p, t in zip(model.described, model.parameters, strict=True)}
    assert callable(change)
    change(state)
    with pytest.raises(InvalidWeights, match=message):
        from_state(LENET5, state)


def test_files_that_are_no_networks_say_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("weights")
    with pytest.raises(InvalidWeights, match="no readable safetensors"):
        load_int8(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "float")
    with pytest.raises(InvalidWeights, match="no int8 network"):
        load_int8(tmp_path / "float")
    save_file({"a": torch.zeros(2)}, tmp_path / "half", {"format": "agentd-int8", "architecture": "{"})
    with pytest.raises(InvalidWeights, match="metadata is damaged"):
        load_int8(tmp_path / "half")
    with pytest.raises(FileNotFoundError):
        load_int8(tmp_path / "missing")
