"""A classifier's file: the int8 network, the names of its classes, and how values become mantissas."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from agentd.errors import ModelUnusable
from agentd.int8.header import ClassifierHeader, read_classifier
from agentd.int8.invalid import InvalidWeights
from agentd.int8.network import Int8Network
from agentd.int8.tensor import Int8Tensor, quantise
from agentd.int8.weights import load_int8, save_int8


@dataclass(frozen=True)
class Model:
    header: ClassifierHeader
    network: Int8Network

    def quantised(self, values: Tensor) -> Int8Tensor:
        """A batch of input values (B, *input) as mantissas. Raises InvalidInput for values that are not finite."""
        header = self.header
        return quantise((values.double() - header.mean) / header.scale, header.exponent)

    def save(self, network: Int8Network, path: Path) -> None:
        """Writes another network of the same kind, with this model's classes and scaling."""
        save_int8(network, path, self.header.metadata())


def load(path: Path) -> Model:
    """Raises ModelUnusable."""
    header = read_classifier(path)
    try:
        return Model(header, load_int8(path))
    except InvalidWeights as error:
        raise ModelUnusable(path, str(error)) from None
    except OSError as error:
        raise ModelUnusable(path, error.strerror or str(error)) from None
