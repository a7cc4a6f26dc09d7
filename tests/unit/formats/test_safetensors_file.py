from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentd.formats import safetensors_file

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(4)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "all.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_some_tensors_become_a_file_of_their_own(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "some.safetensors"
    safetensors_file.extract(source, {"c", "a"}, target)
    tensors = load_file(target)
    assert set(tensors) == set(safetensors_file.names(target)) == {"a", "c"}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in tensors)
    assert target.stat().st_mode & 0o777 == 0o600
    safetensors_file.check(target.read_bytes())
    with pytest.raises(FileExistsError):
        safetensors_file.extract(source, {"a"}, target)
    with pytest.raises(ValueError, match="no tensor z"):
        safetensors_file.extract(source, {"z"}, tmp_path / "other")


def test_what_is_no_whole_file_is_noticed(source: Path) -> None:
    good = source.read_bytes()
    safetensors_file.check(good)
    empty = b"\x02" + bytes(7) + b"{}"
    for bad in (b"", b"1234567", good[:-1], good + b"x", b"\xff" * 64, b"\x09" + bytes(7) + b"[1, 2, 3]", empty):
        with pytest.raises(ValueError, match="no safetensors file"):
            safetensors_file.check(bad)


def test_tensors_are_multiplied_where_they_lie(source: Path) -> None:
    before = source.stat().st_size
    safetensors_file.scale(source, "a", 0.1)
    tensors = load_file(source)
    assert torch.equal(tensors.pop("a"), (TENSORS["a"].double() * 0.1).float())
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in tensors)
    assert source.stat().st_size == before
    for ending in ("b", "z"):
        with pytest.raises(ValueError, match="float32"):
            safetensors_file.scale(source, ending, 0.1)
