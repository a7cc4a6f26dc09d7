"""Reads the header of a GGUF file, and of its shards where it was split: metadata and tensor table, not the weights.
Standard library only.

The format is described in ggml's docs/gguf.md. The daemon reads it to describe and check a model without the
memory of numpy or llama.cpp; a file that is cut short or damaged raises ModelUnusable and nothing else.
"""

import math
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from agentd.errors import ModelUnusable

# value type -> struct format (gguf.md, `gguf_metadata_value_type`); 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# tensor type -> (name, weights per block, bytes per block) (ggml.h, `ggml_type`)
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

_CHUNK = 1 << 20
_MAX_HEADER = 64 << 20  # bytes held in memory; the largest vocabularies known take some 20 MB
_MAX_STRING = 16 << 20
_MAX_ITEMS = 1 << 22  # texts in one array
_MAX_NAME = 1 << 16
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_KEPT_ITEMS = 1 << 12  # longer arrays (vocabulary, merges) are skipped and only counted


class _Damaged(Exception):
    """What is wrong with the file; becomes ModelUnusable."""


@dataclass(frozen=True)
class Tensor:
    """`shape` in ggml's order, the contiguous dimension first; `offset` and `size` in bytes from the file's start.
    `shard` is the place of that file among the header's files."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int
    shard: int = 0


@dataclass(frozen=True)
class Header:
    """`metadata` holds scalars, strings and short arrays (as tuples); `lengths` the length of every array. Where a
    model is split, `tensors` are those of all `files`; everything else is what the first one says."""

    version: int
    metadata: dict[str, Any]
    lengths: dict[str, int]
    tensors: tuple[Tensor, ...]
    data_offset: int
    total_size: int  # bytes the (first) file must have at least
    files: tuple[Path, ...] = ()

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def quantisation(self) -> str:
        """The type in which most of the bytes of its matrices are."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size
        return max(sizes, key=lambda kind: sizes[kind], default="F32")

    @property
    def name(self) -> str | None:
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) else None

    @property
    def block_count(self) -> int:
        """Those that a token goes through: not what predicts several tokens at once (MTP), which some files have."""
        return max(0, (self._size("block_count") or 0) - (self._size("nextn_predict_layers") or 0))

    @property
    def embedding_length(self) -> int:
        return self._size("embedding_length") or 0

    @property
    def context_length(self) -> int | None:
        return self._size("context_length")

    @property
    def head_count(self) -> int | None:
        """Attention heads; the largest number where blocks differ."""
        return self._size("attention.head_count")

    @property
    def head_count_kv(self) -> int | None:
        """Heads of keys and values (grouped-query attention); those of the queries where the file does not say."""
        return self._size("attention.head_count_kv") or self.head_count

    @property
    def feed_forward_length(self) -> int | None:
        """Width of the feed-forward network; the largest where blocks differ."""
        return self._size("feed_forward_length")

    @property
    def vocab_size(self) -> int | None:
        return self.lengths.get("tokenizer.ggml.tokens") or self._size("vocab_size")

    @property
    def has_chat_template(self) -> bool:
        return bool(self.metadata.get("tokenizer.chat_template"))

    @property
    def parameters(self) -> int:
        """Weights in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def _size(self, key: str) -> int | None:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple):  # one number per block
            value = max((item for item in value if isinstance(item, int)), default=None)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_header(path: Path) -> Header:
    """The header of the GGUF file `path`, with its shards. Raises ModelUnusable where llama.cpp would refuse the file,
    or worse."""
    first = _read(path)
    _require_model(path, first)
    files = _files(path, first.metadata)
    parts = [first, *(_read(file) for file in files[1:])]
    tensors = tuple(replace(tensor, shard=i) for i, part in enumerate(parts) for tensor in part.tensors)
    if len({tensor.name for tensor in tensors}) != first.metadata.get("split.tensors.count", len(tensors)):
        raise ModelUnusable(path, "its shards do not belong together: a tensor is missing, or there twice")
    if any(part.metadata.get("split.no", 0) != i for i, part in enumerate(parts)):
        raise ModelUnusable(path, "its shards do not belong together: one has the number of another")
    return replace(first, tensors=tensors, files=files)


def _read(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            return _header(_Reader(file))
    except OSError as error:
        raise ModelUnusable(path, error.strerror or str(error)) from None
    except _Damaged as damage:
        raise ModelUnusable(path, str(damage)) from None


def _files(path: Path, metadata: dict[str, Any]) -> tuple[Path, ...]:
    """The files that a model consists of: llama.cpp looks for the others of a split one by their names."""
    count, number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    if not isinstance(count, int) or count < 2:
        return (path,)
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if number or match is None or int(match[2]) != 1 or int(match[3]) != count:
        raise ModelUnusable(path, f"it is a shard of {count}; name the first one, NAME-00001-of-{count:05}.gguf")
    return tuple(path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))


def _require_model(path: Path, header: Header) -> None:
    architecture, kind = header.metadata.get("general.architecture"), header.metadata.get("general.type", "model")
    if header.metadata.get("split.no"):
        _files(path, header.metadata)  # which says what to name
    if not isinstance(architecture, str):
        raise ModelUnusable(path, "it does not name its architecture (general.architecture)")
    if kind != "model":
        raise ModelUnusable(path, f"it holds no language model; its general.type is {kind!r}")
    has_tensors = header.tensors or header.metadata.get("split.count")  # the first shard may hold the metadata alone
    if not header.block_count or not header.embedding_length or not has_tensors:
        reason = f"it describes no model: no blocks, embeddings or tensors of architecture {architecture!r}"
        raise ModelUnusable(path, reason)


class _Reader:
    """Walks the file, which is read piece by piece, so that nothing is allocated on a damaged length's word."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.file_size = os.fstat(file.fileno()).st_size
        self.data = bytearray()
        self.at = 0

    def advance(self, size: int) -> int:
        """Moves over `size` bytes, which are then in memory, and returns where they begin."""
        begin, self.at = self.at, self.at + size
        if self.at > self.file_size:
            raise _Damaged(f"it is cut short: the header goes on after its end at byte {self.file_size}")
        if self.at > _MAX_HEADER:
            raise _Damaged(f"it is damaged: the header is longer than {_MAX_HEADER} bytes")
        while self.at > len(self.data):
            piece = self.file.read(max(_CHUNK, self.at - len(self.data)))
            if not piece:
                raise _Damaged(f"it is cut short: it ends at byte {len(self.data)}, inside the header")
            self.data += piece
        return begin

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.advance(struct.calcsize("<" + code)))[0]

    def count(self, what: str, limit: int) -> int:
        number = int(self.scalar("Q"))
        if number > limit:
            raise _Damaged(f"it is damaged: {number} {what} before byte {self.at}")
        return number

    def string(self, limit: int = _MAX_STRING) -> str:
        begin = self.advance(self.count("bytes of text", limit))
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError:
            raise _Damaged(f"it is damaged: text that is not UTF-8 at byte {begin}") from None

    def skip_strings(self, number: int) -> None:
        length = struct.Struct("<Q").unpack_from
        for _ in range(number):
            begin = self.at
            self.at += 8
            if self.at > len(self.data):
                self.at = begin
                self.advance(8)
            self.at += length(self.data, begin)[0]
        self.advance(0)


def _array(reader: _Reader) -> tuple[int, tuple[Any, ...] | None]:
    """The length of the array at the reader, and its items if they are few."""
    kind, number = reader.scalar("I"), reader.count("array items", reader.file_size)
    if kind == _STRING:
        if number > _MAX_ITEMS or number * 8 > reader.file_size - reader.at:
            raise _Damaged(f"it is cut short or damaged: {number} texts announced at byte {reader.at}")
        if number <= _KEPT_ITEMS:
            return number, tuple(reader.string() for _ in range(number))
        reader.skip_strings(number)
        return number, None
    code = _SCALARS.get(kind)
    if code is None:
        raise _Damaged(f"it is damaged or too new: an array of type {kind} at byte {reader.at}")
    begin = reader.advance(number * struct.calcsize("<" + code))
    if number > _KEPT_ITEMS:
        return number, None
    return number, struct.unpack_from(f"<{number}{code}", reader.data, begin)


def _metadata(reader: _Reader, number: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(number):
        key, kind = reader.string(_MAX_NAME), reader.scalar("I")
        if key in metadata or key in lengths:
            raise _Damaged(f"it is damaged: the key {key!r} appears twice")
        if kind == _STRING:
            metadata[key] = reader.string()
        elif kind == _ARRAY:
            lengths[key], items = _array(reader)
            if items is not None:
                metadata[key] = items
        elif kind in _SCALARS:
            metadata[key] = reader.scalar(_SCALARS[kind])
        else:
            raise _Damaged(f"it is damaged or too new: the key {key!r} has the unknown type {kind}")
    return metadata, lengths


def _tensor_table(reader: _Reader, number: int, alignment: int) -> list[Tensor]:
    """The tensors, with offsets from the beginning of the data."""
    tensors: list[Tensor] = []
    names: set[str] = set()
    end = 0
    for _ in range(number):
        name, dimensions = reader.string(_MAX_NAME), reader.scalar("I")
        if name in names or not 1 <= dimensions <= 4:
            raise _Damaged(f"it is damaged: tensor {name!r} appears twice or has {dimensions} dimensions")
        names.add(name)
        shape = tuple(reader.scalar("Q") for _ in range(dimensions))
        kind, offset = reader.scalar("I"), reader.scalar("Q")
        if kind not in TENSOR_TYPES:
            raise _Damaged(f"tensor {name!r} has type {kind}, which this version does not know")
        type_name, block, block_size = TENSOR_TYPES[kind]
        if not all(shape) or shape[0] % block:
            raise _Damaged(f"it is damaged: tensor {name!r} of type {type_name} has shape {shape}")
        if offset != end:  # llama.cpp demands the same: one after the other, padded to the alignment
            raise _Damaged(f"it is damaged: tensor {name!r} is said to begin at {offset}, not {end}")
        size = math.prod(shape) // block * block_size
        tensors.append(Tensor(name, shape, type_name, offset, size))
        end = offset + -(-size // alignment) * alignment
    return tensors


def _header(reader: _Reader) -> Header:
    if reader.file_size < 24 or bytes(reader.data[reader.advance(4) : reader.at]) != b"GGUF":
        raise _Damaged("it is not a GGUF file")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise _Damaged(f"it is GGUF version {version}; versions 2 and 3 in little-endian order can be read")
    n_tensors = reader.count("tensors", _MAX_TENSORS)
    metadata, lengths = _metadata(reader, reader.count("metadata keys", _MAX_KEYS))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
        raise _Damaged(f"it is damaged: general.alignment is {alignment!r}")
    tensors = _tensor_table(reader, n_tensors, alignment)
    begin = -(-reader.at // alignment) * alignment
    if tensors and (missing := begin + tensors[-1].offset + tensors[-1].size - reader.file_size) > 0:
        raise _Damaged(f"it is cut short: {missing} of {reader.file_size + missing} bytes are missing")
    placed = tuple(Tensor(t.name, t.shape, t.type, begin + t.offset, t.size) for t in tensors)
    total = placed[-1].offset + placed[-1].size if placed else begin
    return Header(version, metadata, lengths, placed, begin, total)
