"""The training runs of tools/bench/paper/int8.py: one network, one method, one precision, one seed."""

import hashlib
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from agentd.int8 import elastic, loss, sign_ledger
from agentd.int8.elastic import ElasticInt8, Perturbed, part_of
from agentd.int8.floating import FloatNetwork
from agentd.int8.network import Int8Network
from agentd.int8.noise import Noise
from agentd.int8.sign_ledger import SignLedger, SignStep
from agentd.int8.tensor import Int8Tensor, dequantise, quantise
from tools import elastic_float
from tools.bench.paper.int8_data import as_float
from tools.elastic_float import ElasticFloat

INPUT_EXPONENT = -7  # images in [-1, 1]


@dataclass(frozen=True)
class Recipe:
    """What one method uses, in bits for int8 and in rates for fp32."""

    bp_layers: int
    zo_bits: tuple[int, ...]
    bp_bits: tuple[int, ...]
    lr_zo: float
    lr_bp: float
    epsilon: float = 1e-3
    noise: Noise = Noise(15, 128)


@dataclass
class Outcome:
    """Accuracies in percent of the test set, before and after; the sampled agreement of loss signs with float."""

    before: float
    accuracy: float
    seconds: float
    same_logits: float | None = None
    float_forward: float | None = None
    replayed: bool | None = None
    ledger_bytes: int | None = None


def train_int8(
    network: Int8Network,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    recipe: Recipe,
    *,
    steps: int,
    batch: int,
    seed: int,
    samples: int,
) -> Outcome:
    """Trains `network` in place. Every `steps / samples`-th step compares its loss sign with two float ones."""
    run = ElasticInt8(network, recipe.bp_layers, recipe.noise)
    start, written = network.copy(), SignLedger(0, recipe.noise, recipe.bp_layers)
    x, labels = quantise(as_float(train[0]), INPUT_EXPONENT), train[1]
    before = _percent(*elastic.accuracy(network, quantise(as_float(test[0]), INPUT_EXPONENT), test[1]))
    order = torch.Generator().manual_seed(seed)
    agreed: list[tuple[bool, bool]] = []
    seconds = 0.0
    for step in range(steps):
        rows = torch.randint(0, len(labels), (batch,), generator=order)
        inputs, classes, key = x[rows], labels[rows], seed * 10_000_019 + step
        if run.has_zo and samples and step % max(1, steps // samples) == 0:
            agreed.append(_agreement(run, inputs, classes, key))
        zo_bits, bp_bits = part_of(recipe.zo_bits, step, steps), part_of(recipe.bp_bits, step, steps)
        began = time.perf_counter()
        result = run.step(inputs, classes, key, zo_bits=zo_bits, bp_bits=bp_bits)
        seconds += time.perf_counter() - began
        written.steps.append(SignStep(key, result.sign, zo_bits))
    after = _percent(*elastic.accuracy(network, quantise(as_float(test[0]), INPUT_EXPONENT), test[1]))
    outcome = Outcome(before, after, seconds)
    if run.has_zo:
        data = sign_ledger.encode(written)
        sign_ledger.replay(sign_ledger.decode(data), start)
        outcome.replayed = _digest(start, run.cutoff) == _digest(network, run.cutoff)
        outcome.ledger_bytes = len(data)
    if agreed:
        outcome.same_logits = 100 * sum(same for same, _ in agreed) / len(agreed)
        outcome.float_forward = 100 * sum(forward for _, forward in agreed) / len(agreed)
    return outcome


def train_float(
    network: FloatNetwork,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    recipe: Recipe,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> Outcome:
    """Trains `network` in place, with a cosine down to 2 % for both learning rates."""
    run = ElasticFloat(network, recipe.bp_layers, recipe.epsilon)
    before = _percent(*elastic_float.accuracy(network, as_float(test[0]), test[1]))
    order = torch.Generator().manual_seed(seed)
    seconds = 0.0
    for step in range(steps):
        rows = torch.randint(0, len(train[1]), (batch,), generator=order)
        inputs, classes = as_float(train[0][rows]), train[1][rows]
        part = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        began = time.perf_counter()
        run.step(inputs, classes, seed * 10_000_019 + step, lr_zo=part * recipe.lr_zo, lr_bp=part * recipe.lr_bp)
        seconds += time.perf_counter() - began
    return Outcome(before, _percent(*elastic_float.accuracy(network, as_float(test[0]), test[1])), seconds)


def _agreement(run: ElasticInt8, x: Int8Tensor, labels: Tensor, seed: int) -> tuple[bool, bool]:
    """Whether the integer loss sign is that of the float loss of the same logits, and that of a float forward with
    the same perturbed weights. Ties of the integers count as disagreement."""
    whole, same, forward = [], [], []
    values = dequantise(x)
    for sign in (1, -1):
        scratch = Perturbed(run.network, run.cutoff, seed, run.noise, sign)
        logits, _ = run.network.forward(x, scratch=scratch)
        whole.append(loss.cross_entropy(logits, labels))
        same.append(float(functional.cross_entropy(dequantise(logits).double(), labels)))
        weights = [w for i in range(len(run.network.architecture.layers)) for w in scratch.weights(i)]
        copy = FloatNetwork(run.network.architecture, [dequantise(w) for w in weights])
        forward.append(float(functional.cross_entropy(copy.forward(values).double(), labels)))
    sign = (whole[0] > whole[1]) - (whole[0] < whole[1])
    return sign * (same[0] - same[1]) > 0, sign * (forward[0] - forward[1]) > 0


def _percent(right: int, n: int) -> float:
    return 100 * right / n


def _digest(network: Int8Network, cutoff: int) -> str:
    sha256 = hashlib.sha256()
    for described in network.described:
        if described.layer < cutoff:
            sha256.update(network.parameters[described.index].mantissa.numpy().tobytes())
    return sha256.hexdigest()
