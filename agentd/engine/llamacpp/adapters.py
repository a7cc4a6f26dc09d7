"""What makes a revision: LoRA adapters and control vectors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np

from agentd.durable import sha256
from agentd.engine.llamacpp.library import last_words
from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Weights
from agentd.errors import RevisionCorrupt
from agentd.formats import adapter_gguf


@dataclass(frozen=True, eq=False)
class Adapters:
    """A LoRA handle and a control vector (n_layer - 1, n_embd) for layers 1.., or None; `digest` is of their files."""

    lora: Any = None
    control: Floats | None = None
    digest: str = ""


def free(adapters: Adapters) -> None:
    """Gives the memory of adapters back that no one computes with."""
    if adapters.lora:
        lc.llama_adapter_lora_free(adapters.lora)


def load(model: Any, weights: Weights, adapter: Path | None, control: Path | None) -> Adapters:
    """Reads and checks a revision's files. Raises RevisionCorrupt."""
    n_layer, n_embd = int(lc.llama_model_n_layer(model)), int(lc.llama_model_n_embd(model))
    try:
        vector = None if control is None else read_control_vector(control, n_layer, n_embd)
        lora = None if adapter is None else load_lora(model, adapter)
        digest = " ".join(sha256(path) for path in (adapter, control) if path is not None)
    except Exception as error:  # a corrupt GGUF makes the reader fail in many ways
        raise RevisionCorrupt(weights, str(error) or type(error).__name__) from None
    return Adapters(lora, vector, digest)


def load_lora(model: Any, path: Path) -> Any:
    """An adapter handle on the model. Raises ValueError; llama.cpp itself would take numbers that are not finite."""
    adapter_gguf.read_lora(path)
    handle = lc.llama_adapter_lora_init(model, str(path).encode())
    if not handle:
        raise ValueError(last_words())
    return handle


def read_control_vector(path: Path, n_layer: int, n_embd: int) -> Floats:
    """Reads a control vector; layers the file does not name are zero. Raises ValueError."""
    control = np.zeros((n_layer - 1, n_embd), dtype=np.float32)
    for block, vector in adapter_gguf.read_control(path, n_embd).items():
        if not 1 <= block < n_layer:
            raise ValueError(f"{path} has a vector for block {block}, which takes none in a model of {n_layer} blocks")
        control[block - 1] = vector
    return control
