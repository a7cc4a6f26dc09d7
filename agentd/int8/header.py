"""What the file of an int8 classifier says in its header: what it is and what it takes, not the weights.

Metadata of agentd's own in a safetensors file (all texts): `format` agentd-int8, `architecture` (JSON, see
architecture.py), `exponents` (JSON), `classes` (JSON list of names), `input` (JSON {"exponent", "mean", "scale"}): a
value v of an input becomes the mantissa of (v - mean) / scale at that exponent. Standard library only, for the daemon.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.errors import ModelUnusable
from agentd.formats.safetensors_header import read_table
from agentd.int8.architecture import Architecture
from agentd.int8.invalid import InvalidArchitecture

FORMAT = "agentd-int8"


@dataclass(frozen=True)
class ClassifierHeader:
    """An int8 classifier: its network, the names of its classes, and how values become mantissas."""

    network: Architecture
    classes: tuple[str, ...]
    exponent: int
    mean: float
    scale: float

    @property
    def architecture(self) -> str:
        return self.network.name

    @property
    def name(self) -> str | None:
        return None

    def metadata(self) -> dict[str, str]:
        """The part of a file's metadata that `int8.weights` does not write."""
        scaling = {"exponent": self.exponent, "mean": self.mean, "scale": self.scale}
        return {"classes": json.dumps(self.classes, ensure_ascii=False), "input": json.dumps(scaling, sort_keys=True)}


def read_classifier(path: Path) -> ClassifierHeader:
    """The header of the int8 classifier `path`. Raises ModelUnusable."""
    try:
        return parse(read_table(path).metadata)
    except ValueError as error:
        raise ModelUnusable(path, str(error)) from None


def parse(metadata: Mapping[str, str]) -> ClassifierHeader:
    """The classifier that a file's metadata describes. Raises ValueError saying what is wrong."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"it is no int8 network of agentd (its metadata has no format {FORMAT}); "
            f"python -m agentd.engine.int8.quantise makes one of float weights"
        )
    try:
        network = Architecture.parse(json.loads(metadata["architecture"]))
        classes = _classes(json.loads(metadata["classes"]), network.classes)
        scaling = json.loads(metadata["input"])
        exponent, mean, scale = scaling["exponent"], float(scaling["mean"]), float(scaling["scale"])
    except InvalidArchitecture as error:
        raise ValueError(str(error)) from None
    except KeyError as error:
        raise ValueError(f"its metadata has no {error.args[0]}") from None
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"its metadata is damaged: {error}") from None
    if type(exponent) is not int or not math.isfinite(mean) or not (math.isfinite(scale) and scale > 0):
        raise ValueError("its metadata is damaged: input needs a whole exponent, a finite mean and a scale above 0")
    return ClassifierHeader(network, classes, exponent, mean, scale)


def _classes(names: Any, n: int) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("its classes are not a list of names")
    if len(names) != n or len(set(names)) != n:
        raise ValueError(f"its network tells {n} classes apart, and {len(set(names))} different ones are named")
    return tuple(names)
