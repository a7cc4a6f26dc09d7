"""A small classifier of bars, trained and quantised on the spot, and images of bars to send it."""

import base64
import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from agentd.engine.int8.quantise import quantise
from agentd.int8.architecture import Architecture, Conv, Flatten, Linear, MaxPool, ReLU
from agentd.int8.floating import FloatNetwork
from tools.elastic_float import ElasticFloat

CLASSES = ("top", "upper", "lower", "bottom")
SHAPE = (1, 12, 12)
BARS = Architecture(
    "bars", SHAPE, (Conv(4, 3, padding=1), ReLU(), MaxPool(2), Flatten(), Linear(16), ReLU(), Linear(4))
)


def images(n: int, seed: int, *, turned: bool = False) -> tuple[Tensor, Tensor]:
    """uint8 images of one bright bar on noise, lying (or standing, when the camera was turned), and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    x = torch.randint(0, 90, (n, *SHAPE), generator=generator, dtype=torch.uint8)
    for image, label in zip(x, labels.tolist(), strict=True):
        image[0, 3 * label : 3 * label + 2, 2:10] += 130
    return (torch.rot90(x, 1, (2, 3)).contiguous() if turned else x), labels


@functools.cache
def float_weights() -> Path:
    """A safetensors file of float weights, trained on lying bars."""
    model = FloatNetwork.initialised(BARS, 3)
    run = ElasticFloat(model, bp_layers=3)
    for step in range(150):
        x, labels = images(64, 1000 + step)
        run.step((x.float() - 127.5) / 127.5, labels, step, lr_zo=0.0, lr_bp=0.05)
    path = Path(tempfile.mkdtemp(prefix="agentd-int8-")) / "float.safetensors"
    save_file({p.name: t for p, t in zip(model.described, model.parameters, strict=True)}, path)
    return path


@functools.cache
def classifier() -> Path:
    """The same, quantised: a model file for engine int8."""
    x, _ = images(128, 7)
    path = float_weights().with_name("bars.safetensors")
    quantise(float_weights(), BARS, x, path, classes=CLASSES, mean=127.5, scale=127.5)
    return path


def array(image: Tensor, dtype: str = "uint8") -> dict[str, Any]:
    """An input as the engine gets it."""
    data = image.numpy().astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"array": {"dtype": dtype, "shape": list(image.shape), "data": base64.b64encode(data).decode()}}


def png(image: Tensor, mode: str = "L") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image[0].numpy()).convert(mode).save(out, "PNG")
    return out.getvalue()


def write_examples(path: Path, x: Tensor, labels: Tensor) -> Path:
    """Examples as a pass hands them to the engine."""
    lines = [
        {"input": array(image), "choices": list(CLASSES), "target": CLASSES[label]}
        for image, label in zip(x, labels.tolist(), strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
