"""Weights are read piece by piece: the same in every piece, and a file that becomes shorter is an error, no crash."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from agentd.errors import ModelUnusable
from agentd.nn.gguf_file import GGUFFile
from tools import tiny_model

ROWS, COLUMNS = 70, 8192  # more weights than are dequantised at once


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(COLUMNS)
    writer.add_tensor("plain", weights)
    quantised = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantised", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", ["plain", "quantised"])
def test_parts_and_rows_are_those_of_the_whole(path: Path, name: str) -> None:
    file = GGUFFile(path)
    whole = file.load(name)
    assert whole.shape == (ROWS, COLUMNS)
    reader = gguf.GGUFReader(path)
    stored = next(tensor for tensor in reader.tensors if tensor.name == name)
    assert np.array_equal(whole.numpy(), gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(file.load(name, rows=slice(3, 68)), whole[3:68])
    assert torch.equal(file.rows(name, torch.tensor([69, 0, 5])), whole[[69, 0, 5]])
    assert torch.equal(file.load(name, torch.bfloat16), whole.bfloat16())


def test_a_file_that_becomes_shorter_is_an_error(path: Path) -> None:
    file = GGUFFile(path)
    with path.open("r+b") as open_file:
        open_file.truncate(file.header.total_size - 1)
    with pytest.raises(ModelUnusable, match="it ends before byte"):
        file.load("quantised")
    with pytest.raises(ModelUnusable, match="it is cut short"):
        GGUFFile(path)


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    whole = GGUFFile(tiny_model.write(tmp_path / "whole.gguf"))
    split = GGUFFile(tiny_model.write(tmp_path / "split.gguf", shard=20))
    assert len(split.header.files) == 2
    assert whole.tensors.keys() == split.tensors.keys()
    for name in whole.tensors:
        assert torch.equal(split.load(name), whole.load(name))
