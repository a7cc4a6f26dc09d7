"""A language model of a few hundred kilobytes in GGUF: random weights, every byte a token, real in all other respects.

For tests and tools that are about everything but the model: llama.cpp loads it in milliseconds, and a whole pass over
it, backpropagation included, takes seconds.
"""

from pathlib import Path

import gguf
import numpy as np

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_BLOCKS, CONTEXT = 64, 4, 2, 128, 4, 2048
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MERGES = [("y", "e"), ("ye", "s"), ("n", "o")]
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path: Path, seed: int = 0, shard: int = 0, template: str = _TEMPLATE, blocks: int = N_BLOCKS) -> Path:
    """Writes the model to `path` and returns it. The same seed gives the same file.

    shard  0, or the number of tensors a file: the first one, NAME-00001-of-NNNNN.gguf, is returned
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=shard)
    writer.add_name("tiny")
    writer.add_block_count(blocks)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens()))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, template)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape) / shape[-1] ** 0.5
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))

    width = N_HEAD_KV * (N_EMBD // N_HEAD)
    add("token_embd", len(tokens()), N_EMBD)
    for block in (f"blk.{i}" for i in range(blocks)):
        add_norm(f"{block}.attn_norm")
        add(f"{block}.attn_q", N_EMBD, N_EMBD)
        add(f"{block}.attn_k", width, N_EMBD)
        add(f"{block}.attn_v", width, N_EMBD)
        add(f"{block}.attn_output", N_EMBD, N_EMBD)
        add_norm(f"{block}.ffn_norm")
        add(f"{block}.ffn_gate", N_FF, N_EMBD)
        add(f"{block}.ffn_up", N_FF, N_EMBD)
        add(f"{block}.ffn_down", N_EMBD, N_FF)
    add_norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if shard else path


def tokens() -> list[str]:
    """The vocabulary: control tokens, every byte, and what they merge into."""
    return [*_SPECIAL, *_byte_characters(), *("".join(pair) for pair in _MERGES)]


def add_tokenizer(writer: gguf.GGUFWriter, template: str = _TEMPLATE, size: int | None = None) -> None:
    """The vocabulary with its merges and chat template; filled up to `size` tokens with ones that no text has."""
    vocabulary = tokens()
    n = len(vocabulary)
    vocabulary += [f"<|unused_{i}|>" for i in range(n, size or n)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    kinds = [control if token in _SPECIAL else normal for token in vocabulary[:n]]
    writer.add_token_types([*kinds, *[unused] * (len(vocabulary) - n)])
    writer.add_token_merges([" ".join(pair) for pair in _MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)


def _byte_characters() -> list[str]:
    """A printable character for every byte, as GPT-2's vocabulary has them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, spare = {}, 256
    for byte in range(256):
        if byte in printable:
            characters[byte] = chr(byte)
        else:
            characters[byte], spare = chr(spare), spare + 1
    return [characters[byte] for byte in range(256)]
