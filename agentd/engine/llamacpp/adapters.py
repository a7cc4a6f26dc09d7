"""What makes a revision: LoRA adapters and control vectors, and their GGUF files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lc
import numpy as np

from agentd.engine.llamacpp.library import last_words
from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Weights
from agentd.errors import RevisionCorrupt


@dataclass(frozen=True, eq=False)
class Adapters:
    """A LoRA handle and a control vector (n_layer - 1, n_embd) for layers 1.., or None."""

    lora: Any = None
    control: Floats | None = None


def free(adapters: Adapters) -> None:
    """Gives the memory of adapters back that nobody computes with."""
    if adapters.lora:
        lc.llama_adapter_lora_free(adapters.lora)


def load(model: Any, weights: Weights, adapter: Path | None, control: Path | None) -> Adapters:
    """Reads and checks a revision's files. Raises RevisionCorrupt."""
    n_layer, n_embd = int(lc.llama_model_n_layer(model)), int(lc.llama_model_n_embd(model))
    try:
        vector = None if control is None else read_control_vector(control, n_layer, n_embd)
        lora = None if adapter is None else load_lora(model, adapter)
    except Exception as error:  # a corrupt GGUF makes the reader fail in many ways
        raise RevisionCorrupt(weights, str(error) or type(error).__name__) from None
    return Adapters(lora, vector)


def load_lora(model: Any, path: Path) -> Any:
    """An adapter handle on the model. Raises ValueError; llama.cpp itself would take numbers that are not finite."""
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field("adapter.lora.alpha")
    if alpha is None or not np.isfinite(alpha.contents()):
        raise ValueError(f"{path} has no finite adapter.lora.alpha")
    for tensor in reader.tensors:
        if not np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all():
            raise ValueError(f"{tensor.name} of {path} holds values that are not finite")
    handle = lc.llama_adapter_lora_init(model, str(path).encode())
    if not handle:
        raise ValueError(last_words())
    return handle


def write_control_vector(path: Path, control: Floats) -> None:
    """Writes (n_layer - 1, n_embd) as llama.cpp's own control vector format: tensors direction.1, direction.2, …"""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "agentd")
    writer.add_uint32("controlvector.layer_count", len(control))
    for layer, row in enumerate(control):
        writer.add_tensor(f"direction.{layer + 1}", np.ascontiguousarray(row, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_control_vector(path: Path, n_layer: int, n_embd: int) -> Floats:
    """Reads a control vector; layers the file does not name are zero. Raises ValueError."""
    control = np.zeros((n_layer - 1, n_embd), dtype=np.float32)
    tensors = gguf.GGUFReader(path).tensors
    if not tensors:
        raise ValueError(f"{path} holds no control vector")
    for tensor in tensors:
        prefix, _, number = tensor.name.partition(".")
        if (
            prefix != "direction"
            or not number.isdigit()
            or not 1 <= int(number) < n_layer
            or tensor.data.size != n_embd
        ):
            raise ValueError(f"unexpected tensor {tensor.name} of {tensor.data.size} values in {path}")
        control[int(number) - 1] = tensor.data
    if not np.isfinite(control).all():
        raise ValueError(f"{path} holds values that are not finite")
    return control
