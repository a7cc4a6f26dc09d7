"""Weights in and out: float state dicts, post-training quantisation with calibration, safetensors.

A float file holds the architecture's own names (conv1.weight, fc1.bias, bn1.running_mean, ...) or any other names in
the same order and shapes, as torch modules write them. An int8 file holds the mantissas under those names and the
architecture and exponents as metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agentd.formats.safetensors_file import header
from agentd.int8.architecture import Architecture, BatchNorm
from agentd.int8.floating import FloatNetwork
from agentd.int8.invalid import InvalidArchitecture, InvalidWeights
from agentd.int8.network import Int8Network
from agentd.int8.tensor import LIMIT, Int8Tensor, dequantise, quantise

_EPSILON = 1e-5  # torch's default, as in floating.py
_MOMENTS = ("running_mean", "running_var")


def quantised(model: FloatNetwork, calibration: Tensor | None = None) -> Int8Network:
    """Post-training quantisation of a float network; batch normalisation is folded to an affine map.

    Every tensor gets the smallest exponent that holds its largest entry. With `calibration` (a float batch), weights
    are also tried at half that range, clipping outliers for twice the resolution, and layer by layer the exponent
    stays whose output is nearer to the float layer's in the mean square. Raises InvalidInput where a weight is not
    finite.
    """
    parameters = [quantise(value) for value in _folded(model)]
    if calibration is None:
        return Int8Network(model.architecture, parameters)
    exact = FloatNetwork(model.architecture, _folded(model), _unit_statistics(model))
    tried = FloatNetwork(model.architecture, [dequantise(p) for p in parameters], _unit_statistics(model))
    x = y = calibration
    with torch.no_grad():
        for i in range(len(model.architecture.layers)):
            target = exact.forward(x, i, i + 1)
            for p in (p for p in exact.described if p.layer == i and p.name.endswith("weight")):
                finer = quantise(exact.parameters[p.index], parameters[p.index].exponent - 1)
                before = torch.mean((tried.forward(y, i, i + 1) - target) ** 2)
                original = tried.parameters[p.index]
                tried.parameters[p.index] = dequantise(finer)
                if torch.mean((tried.forward(y, i, i + 1) - target) ** 2) < before:
                    parameters[p.index] = finer
                else:
                    tried.parameters[p.index] = original
            x, y = target, tried.forward(y, i, i + 1)
    return Int8Network(model.architecture, parameters)


def input_exponent(calibration: Tensor) -> int:
    """The exponent for a network's inputs, from a float batch of typical ones. Raises InvalidInput.

    The largest may be clipped by one part in 128: values in [-1, 1] would else lose a bit for the sake of 1 itself.
    """
    return quantise(calibration * (LIMIT / (LIMIT + 1))).exponent


def from_state(architecture: Architecture, state: Mapping[str, Tensor]) -> FloatNetwork:
    """A float network from a state dict, by the architecture's names or else by order. Raises InvalidWeights."""
    described = architecture.parameters()
    moments = {p.layer: p for p in described if isinstance(architecture.layers[p.layer], BatchNorm)}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    named = [name for name in state if not name.endswith(_MOMENTS)]
    if not all(p.name in state for p in described):
        if len(named) != len(described):
            reason = f"it has {len(named)} weights and biases, and {len(described)} are needed"
            raise InvalidWeights(architecture.name, [reason])
        by_order = dict(zip((p.name for p in described), named, strict=True))
        renamed = {own: state[theirs] for own, theirs in by_order.items()}
        for p in moments.values():
            for moment in _MOMENTS:
                theirs = by_order[p.name].rpartition(".")[0] + "." + moment
                if theirs in state:
                    renamed[p.name.rpartition(".")[0] + "." + moment] = state[theirs]
        state = renamed
    problems, parameters = [], []
    for p in described:
        # Convolutions over the points of a set, with a kernel of 1, are linear layers here.
        value = state[p.name].squeeze(-1) if state[p.name].dim() == len(p.shape) + 1 else state[p.name]
        if tuple(value.shape) != p.shape:
            problems.append(f"{p.name} has shape {tuple(state[p.name].shape)} instead of {p.shape}")
        elif not value.is_floating_point():
            problems.append(f"{p.name} is {str(value.dtype).removeprefix('torch.')} instead of floating point")
        elif not bool(torch.isfinite(value).all()):
            problems.append(f"{p.name} has entries that are NaN or infinite")
        parameters.append(value)
    if problems:
        raise InvalidWeights(architecture.name, problems)
    statistics = {}
    for layer, p in moments.items():
        prefix = p.name.rpartition(".")[0]
        mean = state.get(f"{prefix}.running_mean", torch.zeros(p.shape))
        var = state.get(f"{prefix}.running_var", torch.ones(p.shape))
        if tuple(mean.shape) != p.shape or tuple(var.shape) != p.shape or not bool((var >= 0).all()):
            raise InvalidWeights(architecture.name, [f"the statistics of {prefix} do not fit"])
        statistics[layer] = (mean.to(torch.float32), var.to(torch.float32))
    return FloatNetwork(architecture, parameters, statistics)


def load_float(architecture: Architecture, path: Path) -> FloatNetwork:
    """A float network from a safetensors file. Raises OSError and InvalidWeights."""
    tensors, _ = _read(path)
    return from_state(architecture, tensors)


def save_int8(network: Int8Network, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes mantissas, exponents and the architecture, and further metadata. The caller makes it visible and
    durable.

    Equal networks give equal files; safetensors' own writer puts metadata in another order each time.
    """
    names = [p.name for p in network.described]
    metadata = {
        **(about or {}),
        "format": "agentd-int8",
        "architecture": json.dumps(network.architecture.as_dict(), sort_keys=True),
        "exponents": json.dumps({n: p.exponent for n, p in zip(names, network.parameters, strict=True)}),
    }
    entries = [(n, "I8", p.shape, p.mantissa.numel()) for n, p in zip(names, network.parameters, strict=True)]
    tensors = b"".join(p.mantissa.contiguous().numpy().tobytes() for p in network.parameters)
    path.write_bytes(header(entries, metadata) + tensors)


def load_int8(path: Path) -> Int8Network:
    """The network that `save_int8` wrote. Raises OSError and InvalidWeights."""
    tensors, metadata = _read(path)
    if metadata.get("format") != "agentd-int8":
        raise InvalidWeights(path, ["it is no int8 network of agentd (its metadata has no format agentd-int8)"])
    try:
        architecture = Architecture.parse(json.loads(metadata["architecture"]))
        exponents = {str(name): int(value) for name, value in json.loads(metadata["exponents"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError, InvalidArchitecture) as error:
        raise InvalidWeights(path, [f"its metadata is damaged: {error}"]) from None
    names = [p.name for p in architecture.parameters()]
    if missing := [name for name in names if name not in tensors or name not in exponents]:
        raise InvalidWeights(path, [f"{name} is missing" for name in missing])
    return Int8Network(architecture, [Int8Tensor(tensors[name], exponents[name]) for name in names])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise InvalidWeights(path, [f"it is no readable safetensors file ({error})"]) from None


def _folded(model: FloatNetwork) -> list[Tensor]:
    """The parameters, with each batch normalisation's statistics taken into its weight and bias."""
    folded = [p.clone() for p in model.parameters]
    for layer, (mean, var) in model.statistics.items():
        weight, bias = (p.index for p in model.described if p.layer == layer)
        folded[weight] = model.parameters[weight] / torch.sqrt(var + _EPSILON)
        folded[bias] = model.parameters[bias] - mean * folded[weight]
    return folded


def _unit_statistics(model: FloatNetwork) -> dict[int, tuple[Tensor, Tensor]]:
    """Statistics with which batch normalisation is its affine map alone."""
    return {
        layer: (torch.zeros_like(mean), torch.full_like(var, 1.0 - _EPSILON))
        for layer, (mean, var) in model.statistics.items()
    }
