"""The file that a training is parked in: whole, or not used at all."""

import os
from pathlib import Path

import pytest

from agentd.formats.training_state import StateSection, TrainingState, part_of_file, write


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "adapter").write_bytes(b"adapter" * 100)
    sections = [part_of_file("adapter", tmp_path / "adapter"), StateSection("mean", 8, [memoryview(b"12345678")])]
    write(tmp_path / "state", {"place": {"step": 3, "loss": 0.1}}, sections)
    return tmp_path / "state"


def test_what_was_written_is_read(state: Path) -> None:
    read = TrainingState.read(state)
    assert read.header == {"place": {"step": 3, "loss": 0.1}}
    assert {name: size for name, (_, size) in read.places.items()} == {"adapter": 700, "mean": 8}
    buffer = bytearray(8)
    read.read_into("mean", memoryview(buffer))
    assert buffer == b"12345678"
    read.extract("adapter", state.with_name("out"))
    assert state.with_name("out").read_bytes() == b"adapter" * 100
    with pytest.raises(ValueError, match="8 bytes of mean, not 4"):
        read.read_into("mean", memoryview(bytearray(4)))
    with pytest.raises(ValueError, match="no best"):
        read.extract("best", state.with_name("out"))


def test_a_part_of_it_and_a_changed_byte_are_told(state: Path) -> None:
    whole = state.read_bytes()
    for length in range(0, len(whole), 7):
        state.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged|no training state"):
            TrainingState.read(state)
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 1
        state.write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged|no training state"):
            TrainingState.read(state)


def test_what_cannot_be_written_leaves_the_one_before(state: Path) -> None:
    before = state.read_bytes()
    with pytest.raises(OSError, match="mean has not 9 bytes"):
        write(state, {}, [StateSection("mean", 9, [b"12345678"])])
    assert state.read_bytes() == before
    assert sorted(os.listdir(state.parent)) == ["adapter", "state"]
