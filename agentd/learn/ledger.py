"""The ledger of a zeroth-order run: 20 bytes a step, enough to make its revision again bit for bit.

A step is (seed, projected gradient, learning rate, epsilon); its update is theta += coefficient * z(seed) with
coefficient = -(learning rate * projected gradient), all in IEEE 754 binary32 (cf. MeZO, Malladi et al. 2023, section
2.1, and FedKSeed, where seeds and scalars are the whole message).

File format, little-endian: magic `AGENTDZO`, version u32, parent revision u64, number of steps u64, the steps as
(u64, f32, f32, f32), CRC-32 of everything before it.
"""

import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MAGIC = b"AGENTDZO"
_VERSION = 1
_HEADER = struct.Struct("<8sIQQ")
_STEP = struct.Struct("<Qfff")
_CRC = struct.Struct("<I")
_FLOAT = struct.Struct("<f")
_MAX_FLOAT = 3.4028234663852886e38


def float32(value: float) -> float:
    """`value` rounded to the nearest binary32 number (infinite where it overflows), as a Python float."""
    if abs(value) > _MAX_FLOAT:
        return math.copysign(math.inf, value)
    rounded: float = _FLOAT.unpack(_FLOAT.pack(value))[0]
    return rounded


@dataclass(frozen=True)
class Step:
    """One applied update along z(seed). The three floats are binary32 values, so that the file loses nothing."""

    seed: int
    projected_gradient: float
    lr: float
    epsilon: float

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed {self.seed} is not an unsigned 64-bit integer")
        for name in ("projected_gradient", "lr", "epsilon"):
            value = float32(getattr(self, name))
            if not math.isfinite(value):
                raise ValueError(f"{name} of the step with seed {self.seed} is not a finite binary32 number")
            object.__setattr__(self, name, value)
        if not math.isfinite(self.coefficient):
            raise ValueError(f"the update of the step with seed {self.seed} overflows binary32")

    @property
    def coefficient(self) -> float:
        """-(lr * projected_gradient) in binary32. The product of two binary32 numbers is exact in binary64, so one
        rounding remains and the result equals that of float32 arithmetic."""
        return -float32(self.lr * self.projected_gradient)


@dataclass
class Ledger:
    """The steps of a run in the order they were applied, on top of revision `parent`."""

    parent: int
    steps: list[Step] = field(default_factory=list)


def fold(steps: Sequence[Step]) -> Iterator[tuple[int, float]]:
    """(seed, coefficient) of every update, in order. Replay: theta += coefficient * z(seed), in float32."""
    for step in steps:
        yield step.seed, step.coefficient


def encode(ledger: Ledger) -> bytes:
    """The ledger in its file format. Equal ledgers give equal bytes."""
    body = bytearray(_HEADER.pack(_MAGIC, _VERSION, ledger.parent, len(ledger.steps)))
    for step in ledger.steps:
        body += _STEP.pack(step.seed, step.projected_gradient, step.lr, step.epsilon)
    return bytes(body) + _CRC.pack(zlib.crc32(body))


def decode(data: bytes) -> Ledger:
    """The ledger in `data`. Raises ValueError saying what is wrong with it."""
    if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise ValueError("this is no ledger: it does not begin with AGENTDZO")
    if len(data) < _HEADER.size:
        raise ValueError(f"the ledger is cut short: {len(data)} of the {_HEADER.size} bytes of its header are there")
    _, version, parent, count = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"the ledger has format version {version}; this agentd reads version {_VERSION}")
    size = _HEADER.size + count * _STEP.size + _CRC.size
    if len(data) != size:
        raise ValueError(f"the ledger has {len(data)} bytes, and its {count} steps need {size}: cut short or damaged")
    if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
        raise ValueError("the ledger is damaged: its checksum does not match")
    steps = [Step(*values) for values in _STEP.iter_unpack(data[_HEADER.size : -_CRC.size])]
    return Ledger(parent, steps)


def write(path: Path, ledger: Ledger) -> None:
    """Writes and fsyncs `path`. The caller makes it visible (revisions are directories renamed into place)."""
    with path.open("wb") as file:
        file.write(encode(ledger))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Ledger:
    """The ledger in the file `path`. Raises OSError, or ValueError naming the file and the damage."""
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
