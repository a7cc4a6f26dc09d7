"""A model in another quantisation: written whole or not at all, never over a file, and measured beside the old one."""

import re
from pathlib import Path

import pytest

from agentd.engine.requantisation import requantise
from agentd.errors import CannotRequantise
from agentd.formats.gguf_header import read_header

TEXTS = ["The ferry leaves at seven in the morning and returns in the late afternoon.", "Mix the flour with salt."]


def test_the_same_model_in_another_type_with_what_it_brings_and_costs(model_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.Q4_1.gguf"
    source.symlink_to(model_path)
    said: list[str] = []
    done: list[tuple[int, int]] = []
    target = requantise(str(source), "q8_0", None, TEXTS, said.append, lambda *each: done.append(each))
    assert target == tmp_path / "model.Q8_0.gguf"
    assert read_header(target).quantisation == "Q8_0"
    assert done[-1][0] == done[-1][1] == len(read_header(target).tensors)
    text = "\n".join(said)
    assert "in Q4_1; from a file in F16" in text
    assert re.search(r"size: \d+ → \d+ MB", text)
    assert len(re.findall(r"\d+ → \d+ tokens/s", text)) == 2
    before, after = map(float, re.findall(r"loss on .*: ([\d.]+) → ([\d.]+) nats", text)[0])
    assert abs(before - after) < 0.05 * before  # eight bits hold what four did
    with pytest.raises(CannotRequantise, match="there already"):
        requantise(str(source), "Q8_0", None, TEXTS, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.Q4_1.gguf", "model.Q8_0.gguf"]


def test_what_cannot_be_written_leaves_nothing(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotRequantise, match=r"no type Q9; there are .*Q4_0"):
        requantise(str(model_path), "Q9", tmp_path / "new.gguf", TEXTS, print)
    with pytest.raises(CannotRequantise, match=str(model_path)):  # it needs an importance matrix
        requantise(str(model_path), "IQ1_S", tmp_path / "new.gguf", TEXTS, print)
    assert not list(tmp_path.iterdir())
