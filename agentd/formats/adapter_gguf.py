"""The GGUF files of what llama.cpp adds to a model: LoRA adapters and control vectors. Imports numpy.

A LoRA adapter has for every matrix that it changes, by the matrix's own name, A (rank, in) as NAME.lora_a and
B (out, rank) as NAME.lora_b; the weight becomes W + alpha / rank * B A. A control vector has direction.1, direction.2,
… (n_embd): what is added to the output of these blocks. All numbers are float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from agentd.durable import replacement

Floats = NDArray[np.float32]
Pair = tuple[Floats, Floats]
"""A (rank, in) and B (out, rank)."""

_DIRECTION = "direction."


def write_lora(path: Path, architecture: str, alpha: float, pairs: Mapping[str, Pair], *, durable: bool = True) -> None:
    """Writes `path` so that a reader sees the whole file or none, after a power cut only if `durable`."""
    with replacement(path, durable=durable) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        tensors = {}
        for name in sorted(pairs):
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = pairs[name]
        _finish(writer, tensors)


def write_control(path: Path, control: Floats) -> None:
    """Writes rows (n, n_embd) for blocks 1 to n; durable once its revision is."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "agentd")
    writer.add_uint32("controlvector.layer_count", len(control))
    _finish(writer, {f"{_DIRECTION}{block + 1}": row for block, row in enumerate(control)})


def _finish(writer: gguf.GGUFWriter, tensors: Mapping[str, Floats]) -> None:
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_lora(path: Path) -> tuple[float, dict[str, Pair]]:
    """alpha, and a pair per tensor of the model, which are views of the file as far as it holds float32.

    Raises ValueError for what is damaged or no LoRA adapter.
    """
    fields, tensors = _read(path)
    if fields.get("adapter.type") != "lora":
        raise ValueError(f"{path} is not a LoRA adapter")
    alpha = fields.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not np.isfinite(alpha):
        raise ValueError(f"{path} has no finite adapter.lora.alpha")
    pairs = {}
    for name in tensors:
        if name.endswith(".lora_a"):
            tensor = name.removesuffix(".lora_a")
            if f"{tensor}.lora_b" not in tensors:
                raise ValueError(f"{path} has no {tensor}.lora_b")
            pairs[tensor] = (tensors[name], tensors[f"{tensor}.lora_b"])
    return alpha, pairs


def read_control(path: Path, n_embd: int) -> dict[int, Floats]:
    """The vectors of a file by block. Raises ValueError for what is damaged, of another width or no control vector."""
    control = {}
    for name, vector in _read(path)[1].items():
        block = name.removeprefix(_DIRECTION)
        if block == name or not block.isdigit():
            raise ValueError(f"{path} is not a control vector: it holds {name}")
        if vector.shape != (n_embd,):
            raise ValueError(f"the control vector {path} does not fit the model at block {block}")
        control[int(block)] = vector
    if not control:
        raise ValueError(f"{path} is not a control vector: it holds none")
    return control


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Metadata and tensors, which are finite."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} of {path} holds values that are not finite")
    return fields, tensors
