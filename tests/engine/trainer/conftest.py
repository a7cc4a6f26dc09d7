"""The test model, taps made with llama.cpp and with transformers, and small models of other architectures."""

import contextlib
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lc
import numpy as np
import pytest
import torch

from agentd.learn.encoded import Encoded
from tools import short_model

N_LAYER = short_model.BLOCKS
Array = np.ndarray[Any, np.dtype[np.float32]]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference(model_path: Path) -> Any:
    """transformers' own full model from the same file, in float32, with nothing of agentd in it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path.parent, gguf_file=model_path.name, dtype=torch.float32)
    return model.requires_grad_(False).eval()


class LlamaCpp:
    """llama.cpp with one context: logits of a sequence, what every block put out, adapters."""

    def __init__(self, path: Path) -> None:
        self._silence = lc.llama_log_callback(lambda *_: None)
        lc.llama_log_set(self._silence, None)
        self.model = lc.llama_model_load_from_file(str(path).encode(), lc.llama_model_default_params())
        assert self.model
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.n_embd, self.n_layer = lc.llama_model_n_embd(self.model), lc.llama_model_n_layer(self.model)
        self.n_vocab = lc.llama_vocab_n_tokens(self.vocab)
        self.outputs: dict[str, Array] = {}
        ggml = ctypes.CDLL(str(Path(lc.__file__).parent / "lib" / "libggml-base.so"))
        ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        ggml.ggml_nelements.restype, ggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
        ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

        def tapped(tensor: Any, ask: bool, _: Any) -> bool:
            name = ggml.ggml_get_name(tensor).decode()
            if name.startswith("l_out-") and not ask:
                out = np.empty(ggml.ggml_nelements(tensor), np.float32)
                ggml.ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
                self.outputs[name] = out.reshape(-1, self.n_embd)
            return bool(name.startswith("l_out-"))

        self._tapped = lc.ggml_backend_sched_eval_callback(tapped)
        params = lc.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 1
        params.cb_eval = self._tapped
        self.context = lc.llama_init_from_model(self.model, params)
        self.batch = lc.llama_batch_init(256, 0, 1)

    def tokens(self, text: str) -> list[int]:
        buffer = (lc.llama_token * 256)()
        n = lc.llama_tokenize(self.vocab, text.encode(), len(text.encode()), buffer, 256, False, True)
        return list(buffer[:n])

    def logits(self, tokens: list[int]) -> Array:
        """(tokens, vocabulary); afterwards `outputs` has what the blocks put out."""
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, i, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = 0, True
        self.batch.n_tokens = len(tokens)
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)
        assert lc.llama_decode(self.context, self.batch) == 0
        rows = [
            np.ctypeslib.as_array(lc.llama_get_logits_ith(self.context, i), (self.n_vocab,)) for i in range(len(tokens))
        ]
        return np.stack(rows)

    @contextlib.contextmanager
    def adapted(self, path: Path) -> Iterator[None]:
        adapter = lc.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter, "llama.cpp does not load the adapter"
        adapters, scales = (lc.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert lc.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0
        yield
        lc.llama_set_adapters_lora(self.context, adapters, 0, scales)
        lc.llama_adapter_lora_free(adapter)


@pytest.fixture(scope="session")
def llama(model_path: Path) -> LlamaCpp:
    return LlamaCpp(model_path)


REVIEWS = (
    ("a wonderful, moving film", 1),
    ("dull from start to finish", 0),
    ("the cast is superb and so is the script", 1),
    ("i wanted my money back", 0),
    ("warm, funny and wise", 1),
    ("an awful mess of a plot", 0),
    ("one of the year's best", 1),
    ("tedious and badly acted", 0),
)


@dataclass
class Case:
    """Examples as the engine encodes them, and the file that it writes them to."""

    prefix: list[int]
    encoded: list[Encoded]
    path: Path

    @property
    def tokens(self) -> list[list[int]]:
        """Of every sequence, whole."""
        return [sequence for each in self.encoded for sequence in each.sequences]

    @property
    def starts(self) -> list[int]:
        """Where the examples' rows begin in a tap."""
        offsets, at = [], len(self.prefix)
        for each in self.encoded:
            offsets.append(at)
            at += each.n_distinct - len(self.prefix)
        return offsets


def write_encoded(path: Path, encoded: list[Encoded]) -> Path:
    path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in encoded))
    return path


@pytest.fixture(scope="session")
def reviews(llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Choices of one and of two tokens, of one sequence and of two; and one free text."""
    head, tail = llama.tokens("<|im_start|>user\nReview: "), llama.tokens("<|im_end|>\n<|im_start|>assistant\n")
    end = llama.tokens("<|im_end|>")[0]
    examples = []
    for i, (text, label) in enumerate(REVIEWS):
        words = ["bad", "good"] if i % 2 else [" not good", " very good"]
        answers = [llama.tokens(word) for word in words]
        prompt = head + llama.tokens(text) + tail
        choices = [
            [(s, len(prompt) - 1 + j, token) for j, token in enumerate(answer)] for s, answer in enumerate(answers)
        ]
        target = [*choices[label], (label, len(prompt) - 1 + len(answers[label]), end)]
        free = i == 4
        sequences = [prompt + answer for answer in answers]
        examples.append(Encoded.of(sequences, [] if free else choices, 0 if free else label, target))
    return Case(head, examples, write_encoded(tmp_path_factory.mktemp("reviews") / "encoded.jsonl", examples))


def distinct(prefix: int, encoded: list[Encoded], hidden: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """(rows, n_embd) as a tap has them, of the states (tokens, n_embd) that `hidden` gives of every sequence."""
    rows = []
    for i, each in enumerate(encoded):
        states, n = [hidden(sequence) for sequence in each.sequences], len(each.shared)
        rows += [states[0][:prefix]] if i == 0 else []
        rows += [states[0][prefix:n], *(state[n:] for state in states)]
    return torch.cat(rows)


@pytest.fixture(scope="session")
def write_tap(reviews: Case, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """write_tap(block) -> a tap of the reference model's own hidden states at the input of `block`."""

    def write(block: int) -> Path:
        path = tmp_path_factory.mktemp("tap") / f"{block}.f32"

        def hidden(tokens: list[int]) -> torch.Tensor:
            states: torch.Tensor = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[block][0]
            return states

        with torch.no_grad():
            path.write_bytes(distinct(len(reviews.prefix), reviews.encoded, hidden).numpy().tobytes())
        return path

    return write


@pytest.fixture
def make_spec(model_path: Path, reviews: Case, tmp_path: Path) -> Any:
    def make(blocks: int, tap: Path, n_layer: int = N_LAYER, **changes: Any) -> dict[str, Any]:
        spec = {
            "model": str(model_path),
            "first_block": n_layer - blocks,
            "end_block": n_layer,
            "tap": str(tap),
            "encoded": str(reviews.path),
            "train": list(range(6)),
            "dev": [6, 7],
            "prefix": len(reviews.prefix),
            "starts": reviews.starts,
            "options": {"batch": 4, "max_epochs": 2, "patience": 9, "lr": 3e-3},
            "initial": None,
            "control": None,
            "output": str(tmp_path / "adapter.gguf"),
        }
        return {**spec, **changes}

    return make


@dataclass
class Run:
    status: int
    events: list[dict[str, Any]]
    log: str

    def kind(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


@pytest.fixture
def run_trainer(tmp_path: Path) -> Any:
    """Runs the real process on a specification (or on other arguments)."""

    def run(spec: Any = None, *arguments: str) -> Run:
        if spec is not None:
            path = tmp_path / "spec.json"
            path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
            arguments = (str(path),)
        command = [sys.executable, "-m", "agentd.trainer", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        return Run(done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr)

    return run


def write_model(path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, Array]) -> None:
    """A GGUF model with a vocabulary of made-up tokens."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        kind(f"{architecture}.{key}", value)
    vocabulary = [f"t{i}" for i in range(len(tensors["token_embd.weight"]))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([0.0] * len(vocabulary))
    writer.add_token_types([1] * len(vocabulary))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def gemma3_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six random blocks with sliding windows of 8 tokens, QK norms, post-norms and scaled embeddings."""
    n_embd, heads, kv, head, width, blocks, vocabulary = 64, 4, 2, 32, 96, 6, 260
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Array:
        values: Array = (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        return values

    def norm(n: int) -> Array:
        values: Array = (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)
        return values

    tensors = {"token_embd.weight": random(vocabulary, n_embd), "output_norm.weight": norm(n_embd)}
    for i in range(blocks):
        tensors |= {
            f"blk.{i}.attn_norm.weight": norm(n_embd),
            f"blk.{i}.attn_q.weight": random(heads * head, n_embd),
            f"blk.{i}.attn_k.weight": random(kv * head, n_embd),
            f"blk.{i}.attn_v.weight": random(kv * head, n_embd),
            f"blk.{i}.attn_output.weight": random(n_embd, heads * head),
            f"blk.{i}.attn_q_norm.weight": norm(head),
            f"blk.{i}.attn_k_norm.weight": norm(head),
            f"blk.{i}.post_attention_norm.weight": norm(n_embd),
            f"blk.{i}.ffn_norm.weight": norm(n_embd),
            f"blk.{i}.ffn_gate.weight": random(width, n_embd),
            f"blk.{i}.ffn_up.weight": random(width, n_embd),
            f"blk.{i}.ffn_down.weight": random(n_embd, width),
            f"blk.{i}.post_ffw_norm.weight": norm(n_embd),
        }
    metadata = {
        "context_length": 512,
        "embedding_length": n_embd,
        "block_count": blocks,
        "feed_forward_length": width,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 8,
        "rope.freq_base": 1e6,
    }
    path = tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"
    write_model(path, "gemma3", metadata, tensors)
    return path


def gemma3(path: Path) -> Any:
    """transformers' own model of it. Its loader takes heads to be 256 wide; llama.cpp goes by the file."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5
    return model.requires_grad_(False).eval()


@pytest.fixture
def small_model() -> Any:
    """Writes a model of one block that claims to be of some architecture."""

    def write(path: Path, architecture: str) -> Path:
        tensors = {
            "token_embd.weight": np.ones((32, 576), np.float32),
            "blk.0.ffn_up.weight": np.ones((8, 576), np.float32),
        }
        write_model(path, architecture, {"block_count": 30, "embedding_length": 576, "context_length": 64}, tensors)
        return path

    return write
