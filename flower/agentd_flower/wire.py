"""The two formats that boards and their fleet share, as agentd has them (revision/fleet_file.py, learn/ledger.py).

A fleet's file is a safetensors file whose tensors are bytes (U8), each a file by its name, under metadata that say what
they are of. A ledger is a header, records of (seed u64, projected gradient, learning rate, epsilon: binary32), and a
CRC-32.
"""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT = "agentd-fleet 1"
LEDGER, LORA, ADAPTER = "ledger", "lora.safetensors", "adapter.gguf"
_HEADER, _RECORD, _CRC = struct.Struct("<8sIQQ"), struct.Struct("<Qfff"), struct.Struct("<I")
_MAGIC, _VERSION = b"AGENTDZO", 1
_EPSILON = 1e-3  # what a step is said to have been measured with; nothing is computed with it
_MAX_HEADER = 1 << 20  # bytes


class Unusable(ValueError):
    """What a board sent is not what it should be."""


@dataclass(frozen=True)
class FleetFile:
    facts: Mapping[str, str]
    files: Mapping[str, bytes] = field(repr=False)

    def encode(self) -> bytes:
        """Equal ones give equal bytes."""
        named, tree, end = sorted(self.files.items()), {}, 0
        tree["__metadata__"] = {"format": FORMAT, **dict(sorted(self.facts.items()))}
        for name, data in named:
            begin, end = end, end + len(data)
            tree[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [begin, end]}
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % 8)
        return struct.pack("<Q", len(text)) + text + b"".join(data for _, data in named)


def decode(data: bytes) -> FleetFile:
    """Raises Unusable."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(_MAX_HEADER, len(data) - 8):
            raise ValueError("cut short")
        table = json.loads(data[8 : 8 + length])
        facts = table.pop("__metadata__")
        if facts.pop("format", None) != FORMAT or not all(isinstance(value, str) for value in facts.values()):
            raise ValueError("it is of another format")
        files, at = {}, 0
        for name, described in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = described["data_offsets"]
            if described["dtype"] != "U8" or begin != at or end < begin:
                raise ValueError(f"{name!r:.60} is no file")
            files[name], at = data[8 + length + begin : 8 + length + end], end
        if 8 + length + at != len(data):
            raise ValueError("its length is wrong")
        return FleetFile(facts, files)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise Unusable(f"this is no file of a fleet: {error}") from None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode_ledger(coefficients: Mapping[int, float]) -> bytes:
    """Steps from the base on, by their seeds, in the order of these: what each adds along z(seed)."""
    body = bytearray(_HEADER.pack(_MAGIC, _VERSION, 0, len(coefficients)))
    for seed in sorted(coefficients):
        body += _RECORD.pack(seed, -coefficients[seed], 1.0, _EPSILON)
    return bytes(body) + _CRC.pack(zlib.crc32(body))


def decode_ledger(data: bytes) -> dict[int, float]:
    """What the steps add along each seed's direction. Raises Unusable."""
    try:
        magic, version, _, count = _HEADER.unpack_from(data)
        whole = len(data) == _HEADER.size + count * _RECORD.size + _CRC.size
        if (magic, version) != (_MAGIC, _VERSION) or not whole:
            raise ValueError("another format, or cut short")
        if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
            raise ValueError("its checksum does not match")
    except (struct.error, ValueError) as error:
        raise Unusable(f"this is no ledger: {error}") from None
    sums: dict[int, float] = {}
    for seed, gradient, lr, _ in _RECORD.iter_unpack(data[_HEADER.size : -_CRC.size]):
        sums[seed] = sums.get(seed, 0.0) - lr * gradient
    if not all(map(math.isfinite, sums.values())):
        raise Unusable("a step of this ledger is not finite")
    return sums
