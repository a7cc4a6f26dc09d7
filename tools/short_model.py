"""A language model made short: the first blocks and the first tokens of a GGUF file, real in all other respects.

For tests that need real shapes, real quantisation or a real tokenizer, and no sense in what the model says. A
vocabulary of byte pairs stays closed when it is cut: a token stands behind the two that are merged into it.
"""

from pathlib import Path

import gguf

BLOCKS, TOKENS = 6, 4096
_CUT = ("tokens", "token_type", "scores")


def write(path: Path, source: Path, blocks: int = BLOCKS, tokens: int | None = TOKENS) -> Path:
    """Writes the first `blocks` blocks and `tokens` tokens (None for all) of `source` to `path` and returns it."""
    reader = gguf.GGUFReader(source)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    tokens = min(tokens or vocabulary, vocabulary)
    architecture = reader.fields["general.architecture"].contents()
    known = {_text(reader.fields["tokenizer.ggml.tokens"], i) for i in range(tokens)}
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, item = field.types[0], field.types[-1]
        value = field.contents() if name != "tokenizer.ggml.merges" else _merges(field, known)
        if name.split(".")[-1] in _CUT and kind == gguf.GGUFValueType.ARRAY:
            value = value[:tokens]
        elif name == f"{architecture}.block_count":
            value = blocks
        elif name == f"{architecture}.vocab_size":
            value = tokens
        writer.add_key_value(name, value, kind, item if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        part, _, rest = tensor.name.partition(".")
        if part == "blk" and int(rest.split(".")[0]) >= blocks:
            continue
        data = tensor.data[:tokens] if len(tensor.data) == vocabulary else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(field: gguf.ReaderField, known: set[str]) -> list[str]:
    """The merges whose three tokens are among the first ones."""
    # a merge makes the next token: behind twice as many there is none of those
    pairs = [_text(field, i).split(" ", 1) for i in range(min(len(field.data), 2 * len(known)))]
    return [f"{a} {b}" for a, b in pairs if a in known and b in known and a + b in known]


def _text(field: gguf.ReaderField, i: int) -> str:
    return bytes(field.parts[field.data[i]]).decode()
