"""What a board gives its fleet, and what the fleet gives its boards: files under one header, as few bytes as it takes.

A safetensors file whose tensors are bytes (U8), each a file by its name: `ledger`, `lora.safetensors` or
`adapter.gguf`, as revisions have them (files.py). Its metadata say what they are of: `engine`, `base_sha256`, `dtype`
where the engine has one, and `ranks` of low-rank adapters, separated by commas. A ledger of 32 steps takes about a
kilobyte.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from agentd.errors import InvalidRequest
from agentd.formats import safetensors_file
from agentd.learn import ledger
from agentd.learn.update_rule import UpdateRule
from agentd.revision.archive import AdapterArchive, Archive, WeightsArchive
from agentd.revision.chain import Segment
from agentd.revision.files import ADAPTER, LEDGER, LORA

FORMAT = "agentd-fleet 1"
_FILES = {WeightsArchive.engine: {LEDGER, LORA}, AdapterArchive.engine: {ADAPTER}}
_MAX_RANK = 1 << 16


@dataclass(frozen=True)
class FleetFile:
    """`facts` are its metadata, texts; `files` its files by name."""

    facts: Mapping[str, str]
    files: Mapping[str, bytes] = field(repr=False)

    def encode(self) -> bytes:
        """Equal ones give equal bytes."""
        named = sorted(self.files.items())
        facts = {"format": FORMAT, **dict(sorted(self.facts.items()))}
        head = safetensors_file.header(((name, "U8", [len(data)], len(data)) for name, data in named), facts)
        return head + b"".join(data for _, data in named)

    def archive(self, source: str) -> Archive:
        """As what a pass takes in. `source` says whose it is. Raises InvalidRequest saying what is wrong with it."""
        engine, base = self.facts.get("engine", ""), self.facts.get("base_sha256", "")
        try:
            if engine not in _FILES or not self.files or set(self.files) - _FILES[engine]:
                raise ValueError(
                    f"its files {', '.join(sorted(self.files)) or '(none)'} are not those of {engine!r:.40}"
                )
            if engine == AdapterArchive.engine:
                if not self.files[ADAPTER].startswith(b"GGUF"):
                    raise ValueError(f"its {ADAPTER} is no GGUF file")
                return AdapterArchive(base, "suffix-bp", 0, 0, files=dict(self.files), source=source)
            return self._weights(base, source)
        except ValueError as error:
            raise InvalidRequest(f"what the fleet sent cannot be used: {error}", param="data") from None

    def _weights(self, base: str, source: str) -> WeightsArchive:
        steps = ledger.decode(self.files[LEDGER]) if LEDGER in self.files else ledger.Ledger(0)
        if steps.parent:
            raise ValueError("its ledger does not begin at the base")
        rule = UpdateRule()
        segments: tuple[Segment, ...] = (Segment(len(steps.steps), rule),) if steps.steps else ()
        files: dict[str, bytes] = {}
        if LORA in self.files:
            safetensors_file.check(self.files[LORA])
            files[LORA] = self.files[LORA]
            segments += (Segment(ranks=_ranks(self.facts.get("ranks", ""))),)
        if not segments:
            raise ValueError("its ledger has no steps")
        return WeightsArchive(
            base,
            "lora" if files else "mezo",
            0,
            0,
            dtype=self.facts.get("dtype", ""),
            update=rule.as_json(),
            weights_sha256="",  # what it leads to is found out here
            steps=steps.steps,
            segments=segments,
            files=files,
            source=source,
        )


def decode(data: bytes) -> FleetFile:
    """Raises InvalidRequest."""
    try:
        safetensors_file.check(data)
        (length,) = struct.unpack_from("<Q", data)
        table = json.loads(data[8 : 8 + length])
        facts = table.pop("__metadata__", {})
        if facts.pop("format", None) != FORMAT or not all(isinstance(value, str) for value in facts.values()):
            raise ValueError("its metadata are not those of a fleet's file")
        files, begins = {}, 0
        for name, described in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = described["data_offsets"]
            if described["dtype"] != "U8" or described["shape"] != [end - begin] or begin != begins:
                raise ValueError(f"its {name!r:.60} is not a file as bytes")
            files[name], begins = data[8 + length + begin : 8 + length + end], end
        return FleetFile(facts, files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"what the fleet sent cannot be read: {error}", param="data") from None


def digest(data: bytes) -> str:
    """By which a board and its fleet name a file that both have."""
    return hashlib.sha256(data).hexdigest()


def _ranks(text: str) -> tuple[int, ...]:
    ranks = tuple(int(part) if part.isdigit() and len(part) < 6 else 0 for part in text.split(","))
    if not all(0 < rank <= _MAX_RANK for rank in ranks):
        raise ValueError("it does not say the ranks of its low-rank adapters")
    return ranks
