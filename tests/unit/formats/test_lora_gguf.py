from pathlib import Path

import gguf
import numpy as np
import pytest

from agentd.errors import PassFailed
from agentd.formats import lora_gguf


def write(path: Path, alpha: float | None) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor("blk.0.ffn_down.weight.lora_a", np.ones((8, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_only_alpha_changes(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    before = write(path, 16.0)
    assert lora_gguf.scale(path, 0.5) == 8.0
    field = gguf.GGUFReader(path).fields["adapter.lora.alpha"]
    assert field.parts[-1][0] == 8.0
    after = path.read_bytes()
    assert len(after) == len(before)
    assert sum(a != b for a, b in zip(after, before, strict=True)) <= 4
    assert lora_gguf.scale(path, 2.0) == 16.0
    assert path.read_bytes() == before


def test_a_file_without_alpha_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    before = write(path, None)
    with pytest.raises(PassFailed, match="alpha"):
        lora_gguf.scale(path, 0.5)
    assert path.read_bytes() == before
