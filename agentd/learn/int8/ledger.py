"""The ledger of the zeroth-order part of an int8 run: 10 bytes a step, enough to make its weights again bit for bit.

A step is (seed, sign, bits); the noise (r_max, density) and the cutoff are the run's. Layers above the cutoff learn by
BP and are stored as weights, not here. File format, little-endian: magic `AGENTDI8`, version u32, parent revision u64,
r_max u16, density u16, bp_layers u32, number of steps u64, the steps as (u64, i8, i8), CRC-32 of everything before it.
"""

import struct
import zlib
from dataclasses import dataclass, field

from agentd.learn.int8.directions import Noise
from agentd.learn.int8.elastic import ElasticInt8
from agentd.learn.int8.network import Int8Network

_MAGIC = b"AGENTDI8"
_VERSION = 1
_HEADER = struct.Struct("<8sIQHHIQ")
_STEP = struct.Struct("<Qbb")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class SignStep:
    """One update: W <- clip(W - sign z(seed) cut to `bits`)."""

    seed: int
    sign: int
    bits: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed {self.seed} is not an unsigned 64-bit integer")
        if self.sign not in (-1, 0, 1):
            raise ValueError(f"the sign of the step with seed {self.seed} is {self.sign}")
        if not -128 <= self.bits <= 127:
            raise ValueError(f"the step with seed {self.seed} has {self.bits} bits")


@dataclass
class SignLedger:
    """The steps of a run in the order they were applied, on top of revision `parent`."""

    parent: int
    noise: Noise
    bp_layers: int
    steps: list[SignStep] = field(default_factory=list)


def replay(ledger: SignLedger, network: Int8Network) -> None:
    """Applies every update to `network`, in place: the parent's weights become the run's, below the cutoff."""
    run = ElasticInt8(network, ledger.bp_layers, ledger.noise)
    for step in ledger.steps:
        run.update_zo(step.seed, step.sign, step.bits)


def encode(ledger: SignLedger) -> bytes:
    """The ledger in its file format. Equal ledgers give equal bytes."""
    noise = ledger.noise
    body = bytearray(
        _HEADER.pack(_MAGIC, _VERSION, ledger.parent, noise.r_max, noise.density, ledger.bp_layers, len(ledger.steps))
    )
    for step in ledger.steps:
        body += _STEP.pack(step.seed, step.sign, step.bits)
    return bytes(body) + _CRC.pack(zlib.crc32(body))


def decode(data: bytes) -> SignLedger:
    """The ledger in `data`. Raises ValueError saying what is wrong with it."""
    if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise ValueError("this is no int8 ledger: it does not begin with AGENTDI8")
    if len(data) < _HEADER.size:
        raise ValueError(f"the ledger is cut short: {len(data)} of the {_HEADER.size} bytes of its header are there")
    _, version, parent, r_max, density, bp_layers, count = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"the ledger has format version {version}; this agentd reads version {_VERSION}")
    size = _HEADER.size + count * _STEP.size + _CRC.size
    if len(data) != size:
        raise ValueError(f"the ledger has {len(data)} bytes, and its {count} steps need {size}: cut short or damaged")
    if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
        raise ValueError("the ledger is damaged: its checksum does not match")
    steps = [SignStep(*values) for values in _STEP.iter_unpack(data[_HEADER.size : -_CRC.size])]
    return SignLedger(parent, Noise(r_max, density), bp_layers, steps)
