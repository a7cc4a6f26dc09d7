"""ElasticZO-INT8: zeroth-order steps below the cutoff, integer backpropagation above it.

One step, for a batch and a seed:

    loss+  of W + z below the cutoff          z made again from the seed, layer by layer, in scratch
    loss-  of W - z below the cutoff          its activations above the cutoff are kept
    g = sign(loss+ - loss-)                   integer losses; 0: no update
    W <- clip(W - g z cut to zo_bits)         below the cutoff
    W <- clip(W - G cut to bp_bits)           above it, G by BP through the minus pass

Full BP is one forward at W. The bits are the learning rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentd.int8 import loss, noise, rounding
from agentd.int8.network import Activation, Int8Network, Scratch
from agentd.int8.noise import Noise
from agentd.int8.tensor import Int8Tensor


@dataclass(frozen=True)
class SignedLosses:
    """Losses are sums over the batch, in bits, Q16; with full BP there is one, and both fields hold it."""

    loss_plus: int
    loss_minus: int
    sign: int


class Perturbed(Scratch):
    """W + z or W - z in the layers below the cutoff, the network's own parameters above it."""

    def __init__(self, network: Int8Network, cutoff: int, seed: int, noise: Noise, sign: int) -> None:
        self.network, self.cutoff, self.seed, self.noise, self.sign = network, cutoff, seed, noise, sign

    def weights(self, layer: int) -> list[Int8Tensor]:
        if layer >= self.cutoff:
            return self.network.weights(layer)
        tensors = []
        for described in self.network.described:
            if described.layer == layer:
                own = self.network.parameters[described.index]
                z = noise.direction(self.seed, described.index, own.shape, self.noise)
                tensors.append(Int8Tensor(noise.perturbed(own.mantissa, z, self.sign), own.exponent))
        return tensors


class ElasticInt8:
    """Trains `network` in place with the last `bp_layers` layers by BP. Raises ValueError for an impossible cutoff.

    `frozen` leaves the layers below the cutoff as they are: BP of the last layers alone.
    """

    def __init__(
        self, network: Int8Network, bp_layers: int, noise: Noise | None = None, *, frozen: bool = False
    ) -> None:
        if frozen and not bp_layers:
            raise ValueError("with frozen layers below the cutoff and none above it, nothing would learn")
        self.network = network
        self.noise = Noise() if noise is None else noise
        self.cutoff = network.architecture.cutoff(bp_layers)
        self.has_zo = not frozen and any(parameter.layer < self.cutoff for parameter in network.described)

    def step(self, x: Int8Tensor, labels: Tensor, seed: int, *, zo_bits: int = 1, bp_bits: int = 4) -> SignedLosses:
        """One step on a batch. Raises InvalidInput and InvalidLabels, and then has changed nothing."""
        x = self.network.check(x)
        labels = loss.checked_labels(labels, x.shape[0], self.network.architecture.classes)
        if self.has_zo:
            plus, minus, logits, activations = self.measure(x, labels, seed)
        else:
            logits, activations = self.network.forward(x, record_from=self.cutoff)
            plus = minus = loss.cross_entropy(logits, labels)
        sign = (plus > minus) - (plus < minus)
        self.update_zo(seed, sign, zo_bits)
        if activations:
            self.update_bp(activations, loss.gradient(logits, labels), bp_bits)
        return SignedLosses(plus, minus, sign)

    def measure(self, x: Int8Tensor, labels: Tensor, seed: int) -> tuple[int, int, Int8Tensor, list[Activation]]:
        """The losses at W + z and W - z, and the minus pass's logits and activations above the cutoff."""
        logits, _ = self.network.forward(x, scratch=Perturbed(self.network, self.cutoff, seed, self.noise, 1))
        plus = loss.cross_entropy(logits, labels)
        scratch = Perturbed(self.network, self.cutoff, seed, self.noise, -1)
        logits, activations = self.network.forward(x, scratch=scratch, record_from=self.cutoff)
        return plus, loss.cross_entropy(logits, labels), logits, activations

    def update_zo(self, seed: int, sign: int, bits: int) -> None:
        """The zeroth-order update: all that a ledger's replay needs."""
        for described in self.network.described:
            if described.layer < self.cutoff:
                weight = self.network.parameters[described.index].mantissa
                noise.descend(weight, seed, described.index, self.noise, sign, bits)

    def update_bp(self, activations: list[Activation], error: Int8Tensor, bits: int) -> None:
        for described, gradient in self.network.backward(activations, error):
            rounding.descend(self.network.parameters[described.index].mantissa, gradient, bits)


def part_of(schedule: Sequence[int], step: int, steps: int) -> int:
    """The bits of step `step` (from 0): a schedule's entries take turns of equal length over a run."""
    return schedule[len(schedule) * step // steps]


def accuracy(network: Int8Network, x: Int8Tensor, labels: Tensor, batch: int = 1000) -> tuple[int, int]:
    """(right, all) of a data set."""
    return int((predict(network, x, batch) == labels).sum()), len(labels)


def predict(network: Int8Network, x: Int8Tensor, batch: int = 1000) -> Tensor:
    """The class of each example: int64 of shape (n,). Raises InvalidInput."""
    network.check(x)
    parts = [network.forward(x[start : start + batch])[0] for start in range(0, x.shape[0], batch)]
    return torch.cat([logits.mantissa.argmax(1) for logits in parts])
