"""The ledger of a zeroth-order run: a few bytes a step, enough to make its revision again bit for bit.

A step is (seed, projected gradient, learning rate, epsilon), 20 bytes. Its update is theta += coefficient * z(seed)
with coefficient = -(learning rate * projected gradient), in IEEE 754 binary32 (cf. MeZO, Malladi et al. 2023, section
2.1, and FedKSeed, where seeds and scalars are the whole message). Runs in integers have steps of their own
(int8/sign_ledger.py), in the same format.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from agentd import durable

_CRC = struct.Struct("<I")
_FLOAT = struct.Struct("<f")
_MAX_FLOAT = 3.4028234663852886e38


@dataclass(frozen=True)
class LedgerFormat:
    """Bytes of a ledger, little-endian: 8 bytes `magic`, version u32, parent revision u64, the fields of the `run`, the
    number of records u64, the records, CRC-32 of everything before it. `run`, `record`: in struct's notation."""

    magic: bytes
    run: str
    record: str
    version: int = 1

    def encode(self, parent: int, run: Sequence[int], records: Sequence[tuple[float, ...]]) -> bytes:
        """Equal ledgers give equal bytes."""
        record = struct.Struct(f"<{self.record}")
        body = bytearray(self._header.pack(self.magic, self.version, parent, *run, len(records)))
        for values in records:
            body += record.pack(*values)
        return bytes(body) + _CRC.pack(zlib.crc32(body))

    def decode(self, data: bytes) -> tuple[int, list[int], list[tuple[Any, ...]]]:
        """The parent, the run's fields, and the records. Raises ValueError saying what is wrong with `data`."""
        header, record = self._header, struct.Struct(f"<{self.record}")
        if data[: len(self.magic)] != self.magic[: len(data)]:
            raise ValueError(f"this is no ledger: it does not begin with {self.magic.decode()}")
        if len(data) < header.size:
            raise ValueError(f"the ledger is cut short: {len(data)} of the {header.size} bytes of its header are there")
        _, version, parent, *run, count = header.unpack_from(data)
        if version != self.version:
            raise ValueError(f"the ledger has format version {version}; this agentd reads version {self.version}")
        size = header.size + count * record.size + _CRC.size
        if len(data) != size:
            raise ValueError(
                f"the ledger has {len(data)} bytes, and its {count} steps need {size}: cut short or damaged"
            )
        if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
            raise ValueError("the ledger is damaged: its checksum does not match")
        return parent, run, list(record.iter_unpack(data[header.size : -_CRC.size]))

    @property
    def _header(self) -> struct.Struct:
        return struct.Struct(f"<8sIQ{self.run}Q")


_FORMAT = LedgerFormat(b"AGENTDZO", run="", record="Qfff")


def check_seed(seed: int) -> None:
    """Raises ValueError."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit integer")


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
        check_seed(self.seed)
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
    return _FORMAT.encode(ledger.parent, (), [astuple(step) for step in ledger.steps])


def decode(data: bytes) -> Ledger:
    """The ledger in `data`. Raises ValueError saying what is wrong with it."""
    parent, _, records = _FORMAT.decode(data)
    return Ledger(parent, [Step(*record) for record in records])


def write(path: Path, ledger: Ledger) -> None:
    """Writes and fsyncs `path`. The caller makes it visible (revisions are directories renamed into place)."""
    with durable.new_file(path, "wb") as file:
        file.write(encode(ledger))


def read(path: Path) -> Ledger:
    """The ledger in the file `path`. Raises OSError, or ValueError naming the file and the damage."""
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
