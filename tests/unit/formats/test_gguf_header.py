import contextlib
import mmap
import random
import shutil
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from agentd.errors import ModelUnusable
from agentd.formats.gguf_header import TENSOR_TYPES, Header, read_header


@pytest.fixture(scope="module")
def header_bytes(real_model: Path) -> bytes:
    with real_model.open("rb") as file:
        return file.read(read_header(real_model).data_offset)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A complete model file of a few hundred bytes, written by the reference implementation."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "tiny")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count([4, 2])
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length([64, 96])
    writer.add_context_length(128)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_chat_template("{{ messages }}")
    writer.add_float32("tiny.scale", 0.5)
    writer.add_bool("tiny.flag", True)
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(5, np.float16))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def outcome(path: Path, data: bytes) -> Header | str:
    path.write_bytes(data)
    try:
        return read_header(path)
    except ModelUnusable as error:
        return str(error)


def test_describes_the_model(real_model: Path) -> None:
    header = read_header(real_model)
    reference = gguf.GGUFReader(real_model)
    assert header.architecture == reference.fields["general.architecture"].contents()
    assert header.name == reference.fields["general.name"].contents()
    for ours, key in (
        (header.block_count, "block_count"),
        (header.embedding_length, "embedding_length"),
        (header.head_count, "attention.head_count"),
        (header.head_count_kv, "attention.head_count_kv"),
        (header.feed_forward_length, "feed_forward_length"),
        (header.context_length, "context_length"),
    ):
        assert ours == reference.fields[f"{header.architecture}.{key}"].contents()
    assert header.vocab_size == len(reference.fields["tokenizer.ggml.tokens"].data)
    assert header.has_chat_template == ("tokenizer.chat_template" in reference.fields)
    assert header.data_offset == reference.data_offset
    assert header.total_size == real_model.stat().st_size


def test_lists_every_tensor_where_it_lies(real_model: Path) -> None:
    ours = [(t.name, t.shape, t.type, t.offset, t.size) for t in read_header(real_model).tensors]
    reference = [
        (t.name, tuple(int(n) for n in t.shape), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in gguf.GGUFReader(real_model).tensors
    ]
    assert ours == reference


def test_knows_the_tensor_types_of_the_reference() -> None:
    assert {t.value: (t.name, *sizes) for t, sizes in gguf.GGML_QUANT_SIZES.items()} == TENSOR_TYPES


def test_numbers_that_differ_by_block_are_their_largest(tmp_path: Path, small_gguf: bytes) -> None:
    header = outcome(tmp_path / "m.gguf", small_gguf)
    assert isinstance(header, Header)
    assert (header.head_count, header.head_count_kv, header.feed_forward_length) == (4, 2, 96)
    assert header.metadata["tiny.feed_forward_length"] == (64, 96)
    assert header.metadata["tokenizer.ggml.tokens"] == ("a", "b", "ü")
    assert (header.metadata["tiny.scale"], header.metadata["tiny.flag"]) == (0.5, True)
    assert header.parameters == 3 * 32 + 5 + 2 * 32


def test_reads_fast_and_keeps_no_vocabulary(real_model: Path) -> None:
    began = time.perf_counter()
    header = read_header(real_model)
    assert time.perf_counter() - began < 1.0  # 13 ms where nothing else runs
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert header.lengths["tokenizer.ggml.tokens"] == header.vocab_size


@pytest.mark.slow
def test_every_truncation_of_a_small_file_is_refused(tmp_path: Path, small_gguf: bytes) -> None:
    # the padding after the last tensor is not needed
    needed = read_header_size(tmp_path / "whole.gguf", small_gguf)
    for length in range(needed):
        message = outcome(tmp_path / "cut.gguf", small_gguf[:length])
        assert isinstance(message, str), length
        assert "cut short" in message or "not a GGUF file" in message
    assert isinstance(outcome(tmp_path / "cut.gguf", small_gguf[:needed]), Header)


def read_header_size(path: Path, data: bytes) -> int:
    header = outcome(path, data)
    assert isinstance(header, Header)
    return header.total_size


@pytest.mark.slow
def test_every_flipped_bit_of_a_small_file_is_refused_or_read(tmp_path: Path, small_gguf: bytes) -> None:
    path = tmp_path / "flipped.gguf"
    header = outcome(path, small_gguf)
    assert isinstance(header, Header)
    refused = 0
    for position in range(header.data_offset):
        for bit in range(8):
            data = bytearray(small_gguf)
            data[position] ^= 1 << bit
            refused += isinstance(outcome(path, bytes(data)), str)
    assert refused > header.data_offset  # lengths, types and offsets are noticed; a letter of a name is not


def test_truncations_of_the_real_header_are_refused(tmp_path: Path, header_bytes: bytes) -> None:
    random_positions = random.Random(0).sample(range(len(header_bytes)), 60)
    for length in [*range(0, 400, 13), *random_positions, *range(len(header_bytes) - 200, len(header_bytes), 23)]:
        assert isinstance(outcome(tmp_path / "cut.gguf", header_bytes[:length]), str), length


def test_a_missing_last_byte_is_noticed(tmp_path: Path, real_model: Path) -> None:
    path = tmp_path / "short.gguf"
    shutil.copy(real_model, path)
    with path.open("r+b") as file:
        file.truncate(real_model.stat().st_size - 1)
    with pytest.raises(ModelUnusable, match=r"cut short: 1 of \d+ bytes are missing"):
        read_header(path)


def test_damage_in_the_real_header_never_escapes(tmp_path: Path, real_model: Path, header_bytes: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(header_bytes)
    with path.open("r+b") as file:
        file.truncate(real_model.stat().st_size)  # the weights are a hole
    dice = random.Random(1)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for position in [*range(64), *dice.sample(range(len(header_bytes)), 60)]:
            before = memory[position]
            memory[position] = dice.choice((0x00, 0xFF, before ^ 0x80))
            with contextlib.suppress(ModelUnusable):
                assert read_header(path).tensors
            memory[position] = before
        assert read_header(path).total_size == real_model.stat().st_size


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + bytes(100), "GGUF version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "little-endian"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 100, "damaged"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "architecture"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, data: bytes, message: str) -> None:
    reason = outcome(tmp_path / "other.gguf", data)
    assert isinstance(reason, str)
    assert message in reason


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnusable, match="type is 'adapter'"):
        read_header(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="No such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(ModelUnusable, match="directory"):
        read_header(tmp_path)
