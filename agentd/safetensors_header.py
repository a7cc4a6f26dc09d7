"""Reads the header of a safetensors file, and what an int8 classifier's says: what it is and what it takes, not the
weights.

Standard library only, for the daemon; a file that is cut short, damaged or something else raises ModelUnusable and
nothing else. The format: eight bytes with the length of a JSON header, the header, the tensors.

Metadata of agentd's own (all texts): `format` agentd-int8, `architecture` (JSON, learn/int8/architecture.py),
`exponents` (JSON), `classes` (JSON list of names), `input` (JSON {"exponent", "mean", "scale"}): a value v of an input
becomes the mantissa of (v - mean) / scale at that exponent.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.errors import ModelUnusable
from agentd.learn.int8.architecture import Architecture
from agentd.learn.int8.errors import InvalidArchitecture

FORMAT = "agentd-int8"
_MAX_HEADER = 100 << 20  # bytes


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
        """The part of a file's metadata that `learn.int8.weights` does not write."""
        scaling = {"exponent": self.exponent, "mean": self.mean, "scale": self.scale}
        return {"classes": json.dumps(self.classes, ensure_ascii=False), "input": json.dumps(scaling, sort_keys=True)}


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file does; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            beginning = file.read(9)
    except OSError:
        return False
    return len(beginning) == 9 and beginning[8:] == b"{" and struct.unpack("<Q", beginning[:8])[0] <= _MAX_HEADER


@dataclass(frozen=True)
class Table:
    """What a safetensors file holds: {name: {"dtype", "shape", "data_offsets"}}, its metadata, and where data begin."""

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data: int


def read_table(path: Path) -> Table:
    """The header of the safetensors file `path`. Raises ModelUnusable for anything else, or what is cut short."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ModelUnusable(path, "it is no safetensors file, or cut short")
            tree = json.loads(file.read(length))
    except OSError as error:
        raise ModelUnusable(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise ModelUnusable(path, "it is no safetensors file: its header is not JSON") from None
    try:
        metadata = tree.pop("__metadata__", {})
        ends = [tensor["data_offsets"][1] for tensor in tree.values()]
        missing = 8 + length + max(ends, default=0) - size
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ModelUnusable(path, "it is no safetensors file: its header has no table of tensors") from None
    if missing > 0:
        raise ModelUnusable(path, f"it is cut short: {missing} of {size + missing} bytes are missing")
    return Table(tree, metadata, 8 + length)


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
