"""Bytes and milliseconds of a training step, for tools/bench/paper/int8.py."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from agentd.int8 import loss
from agentd.int8 import step_memory as predicted
from agentd.int8.architecture import Architecture
from agentd.int8.elastic import ElasticInt8
from agentd.int8.floating import FloatNetwork
from agentd.int8.tensor import Int8Tensor, quantise
from agentd.int8.weights import quantised
from tools.elastic_float import ElasticFloat


def step_memory(architecture: Architecture, batch: int, bp_layers: int) -> dict[str, int]:
    """Bytes by the paper's model, and at the measured peak of torch's allocations in a step, weights included."""
    steps = _steps(architecture, batch, bp_layers)
    sizes: dict[str, int] = {}
    for precision, (step, _, size) in steps.items():
        sizes[f"model_{precision}"] = predicted.step_bytes(architecture, batch, bp_layers, int8=precision == "int8")
        sizes[f"measured_{precision}"] = size + _peak(step)
    return sizes


def step_time(architecture: Architecture, batch: int, bp_layers: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step and of its forward part, by precision, taken in turns. The forward part includes
    making the perturbed weights; what is left is BP and the update."""
    steps = _steps(architecture, batch, bp_layers)
    milliseconds: dict[str, list[float]] = {f"{p}_{kind}": [] for p in steps for kind in ("total", "forward")}
    for repeat in range(repeats + 2):
        for precision, (step, forward, _) in steps.items():
            for kind, call in (("total", step), ("forward", forward)):
                began = time.perf_counter()
                call()
                if repeat >= 2:
                    milliseconds[f"{precision}_{kind}"].append(1000 * (time.perf_counter() - began))
    return {key: sorted(values)[len(values) // 2] for key, values in milliseconds.items()}


def _steps(
    architecture: Architecture, batch: int, bp_layers: int
) -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
    """By precision: a whole step, its forward part, and the bytes of the weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *architecture.input, generator=generator) * 2 - 1
    labels = torch.arange(batch) % architecture.classes
    model = FloatNetwork.initialised(architecture, 0)
    whole = ElasticInt8(quantised(model), bp_layers)
    exact = ElasticFloat(model, bp_layers, epsilon=1e-30)  # does all the work and leaves the weights as they are
    mantissas = quantise(x, -7)
    return {
        "fp32": (
            lambda: exact.step(x, labels, 1, lr_zo=0.0, lr_bp=1e-9),
            lambda: _float_forward(exact, x, labels),
            4 * architecture.size,
        ),
        "int8": (
            lambda: whole.step(mantissas, labels, 1, zo_bits=-6, bp_bits=-6),
            lambda: _int8_forward(whole, mantissas, labels),
            architecture.size,
        ),
    }


def _float_forward(run: ElasticFloat, x: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        for scale in (run.epsilon, -2 * run.epsilon) if run.below else ():
            run.shift(1, scale)
            functional.cross_entropy(run.network.forward(x, training=True), labels)
        if not run.below:
            functional.cross_entropy(run.network.forward(x, training=True), labels)


def _int8_forward(run: ElasticInt8, x: Int8Tensor, labels: Tensor) -> None:
    if run.has_zo:
        run.measure(x, labels, 1)
    else:
        loss.cross_entropy(run.network.forward(x, record_from=0)[0], labels)


def _peak(step: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out during a second call, above what it began with."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
