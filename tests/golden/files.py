"""The bytes of every kind of file that agentd writes for itself or for others, from fixed numbers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from agentd.engine.int8.quantise import quantise
from agentd.engine.transformers import image
from agentd.formats import lora_gguf, safetensors_file
from agentd.formats.adapter_gguf import write_control
from agentd.learn import ledger
from agentd.nn.lora_blocks import write_adapter

from .samples import BARS, CLASSES, classifier, fractions, images, sha256

LAYERS = ("blk.2.ffn_down.weight", "blk.3.attn_q.weight", "blk.10.ffn_up.weight")


def measure(folder: Path) -> dict[str, Any]:
    """sha256 of each."""
    paths = {
        "adapter": _adapter(folder / "adapter.gguf"),
        "adapter, scaled": _scaled(folder),
        "control vector": _control(folder),
        "ledger": _ledger(folder),
        "tensors": _tensors(folder),
        "tensors, extracted": _extracted(folder),
        "int8 network": classifier(folder),
        "int8 network, quantised": _quantised(folder),
    }
    return {what: sha256(path.read_bytes()) for what, path in paths.items()}


def _adapter(path: Path) -> Path:
    pairs = {name: (fractions(4, 64, salt=i), fractions(96, 4, salt=50 + i)) for i, name in enumerate(LAYERS)}
    write_adapter(path, "llama", 16.0, pairs)
    return path


def _scaled(folder: Path) -> Path:
    path = _adapter(folder / "scaled.gguf")
    lora_gguf.scale(path, 0.6)
    return path


def _control(folder: Path) -> Path:
    path = folder / "control.gguf"
    write_control(path, fractions(3, 64).numpy())
    return path


def _ledger(folder: Path) -> Path:
    path = folder / "ledger"
    steps = [ledger.Step((1 << 64) - 1 - i, 0.1 * i - 0.3, 1e-3 / (i + 1), 1e-3) for i in range(7)]
    ledger.write(path, ledger.Ledger(41, steps))
    return path


def _tensors(folder: Path) -> Path:
    path = folder / "tensors.safetensors"
    brain = fractions(5, 3, salt=2).to(torch.bfloat16)
    image.write(path, {"first": fractions(7), "second.weight": brain, "third": fractions(2, 2, 2, salt=3)})
    return path


def _extracted(folder: Path) -> Path:
    path = folder / "extracted.safetensors"
    safetensors_file.extract(_tensors(folder), ("first", "third"), path)
    return path


def _quantised(folder: Path) -> Path:
    """Of float weights of very different sizes, whose exponents calibration has to choose."""
    path, source = folder / "quantised.safetensors", folder / "float.safetensors"
    state = {p.name: fractions(*p.shape, salt=p.index) * 0.7**p.index for p in BARS.parameters()}
    save_file(state, source)
    quantise(source, BARS, images(24)[0], path, classes=CLASSES, mean=127.5, scale=127.5)
    return path
