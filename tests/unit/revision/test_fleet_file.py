"""What travels between a board and its fleet."""

import pytest

from agentd.errors import InvalidRequest
from agentd.formats import safetensors_file
from agentd.learn import ledger
from agentd.learn.ledger import Ledger, Step
from agentd.revision import fleet_file
from agentd.revision.archive import AdapterArchive, WeightsArchive
from agentd.revision.fleet_file import FleetFile

BASE = "ab" * 32
STEPS = [Step(7 + i, 0.5 - i, 1e-3, 1e-3) for i in range(32)]
FACTS = {"engine": "transformers", "base_sha256": BASE, "dtype": "float32"}
FACTORS = safetensors_file.header([("base_model.model.a.lora_A.weight", "F32", [1, 2], 8)]) + bytes(8)


def of_ledger(parent: int = 0) -> FleetFile:
    return FleetFile(FACTS, {"ledger": ledger.encode(Ledger(parent, STEPS))})


def test_a_file_comes_back_as_it_was() -> None:
    file = FleetFile({**FACTS, "ranks": "8"}, {"ledger": b"12345", "lora.safetensors": b"", "x": b"\x00\xff"})
    assert fleet_file.decode(file.encode()) == file
    assert file.encode() == fleet_file.decode(file.encode()).encode()


def test_a_round_of_32_steps_takes_about_a_kilobyte() -> None:
    assert len(of_ledger().encode()) < 1100


def test_a_ledger_is_an_archive_from_the_base() -> None:
    archive = fleet_file.decode(of_ledger().encode()).archive("round 1")
    assert isinstance(archive, WeightsArchive)
    assert (archive.base_sha256, archive.dtype, archive.source) == (BASE, "float32", "round 1")
    assert archive.steps == STEPS
    assert [segment.steps for segment in archive.segments] == [32]


def test_steps_come_before_low_rank_factors() -> None:
    files = {"ledger": ledger.encode(Ledger(0, STEPS)), "lora.safetensors": FACTORS}
    archive = FleetFile({**FACTS, "ranks": "1"}, files).archive("round 1")
    assert isinstance(archive, WeightsArchive)
    assert [(segment.steps, segment.ranks) for segment in archive.segments] == [(32, ()), (0, (1,))]
    assert archive.files == {"lora.safetensors": FACTORS}


def test_an_adapter_is_one_of_engine_llamacpp() -> None:
    facts = {"engine": "llamacpp", "base_sha256": BASE}
    archive = FleetFile(facts, {"adapter.gguf": b"GGUF..."}).archive("round 1")
    assert isinstance(archive, AdapterArchive)
    assert archive.files == {"adapter.gguf": b"GGUF..."}


WHOLE = of_ledger().encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 100, WHOLE[:-1], WHOLE + b"x", WHOLE.replace(b"agentd-fleet 1", b"agentd-fleet 9"), FACTORS],
)
def test_damage_is_told(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="what the fleet sent cannot be read"):
        fleet_file.decode(data)


@pytest.mark.parametrize(
    ("facts", "files", "message"),
    [
        (FACTS, {}, "are not those of"),
        (FACTS, {"adapter.gguf": b"GGUF"}, "are not those of"),
        ({**FACTS, "engine": "int8"}, {"ledger": b""}, "are not those of"),
        ({**FACTS, "engine": "llamacpp"}, {"adapter.gguf": b"ELF"}, "no GGUF file"),
        (FACTS, {"ledger": b"AGENTDZO"}, "cut short"),
        (FACTS, {"ledger": ledger.encode(Ledger(3, STEPS))}, "does not begin at the base"),
        (FACTS, {"ledger": ledger.encode(Ledger(0))}, "no steps"),
        (FACTS, {"lora.safetensors": FACTORS}, "does not say the ranks"),
        ({**FACTS, "ranks": "0"}, {"lora.safetensors": FACTORS}, "does not say the ranks"),
        ({**FACTS, "ranks": "8"}, {"lora.safetensors": b"?"}, "no safetensors file"),
    ],
)
def test_what_cannot_be_used_is_told(facts: dict[str, str], files: dict[str, bytes], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        FleetFile(facts, files).archive("x")
