"""What goldens begin with: numbers and texts that are the same everywhere, and engines called as a pass calls them."""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentd.engine.operations import Operation, P, R
from agentd.engine.session import OperationSession
from agentd.formats.adapter_gguf import write_control
from agentd.int8.architecture import Architecture, Conv, Flatten, Linear, MaxPool, ReLU
from agentd.int8.header import ClassifierHeader
from agentd.int8.network import Int8Network
from agentd.int8.tensor import Int8Tensor
from agentd.int8.weights import save_int8
from agentd.nn.lora_blocks import write_adapter
from tools import tiny_model

CHOICES = ["yes", "no"]  # a token each in the tiny model
WORDS = ["good", "not good"]  # several tokens each, not equally many
_TEXTS = (
    "aaaaaaa",
    "zzzzz",
    "aaaa 1",
    "zzzzzzzzz 2",
    "a long row of the first letter: aaaaaaaaaaaaaaaa",
    "zzzzzz, and nothing else",
    "aaaaa?",
    "zz",
    "aaaaaaaaaaaa",
    "z z z z z z",
    "a a a a",
    "zzzzzzzz",
    "aaa",
    "zzzzzzz!",
)
TRAIN, DEV = list(range(10)), list(range(10, 14))


def examples() -> list[dict[str, Any]]:
    """Choices of one token and of several, and in three places free text."""
    rows = []
    for number, text in enumerate(_TEXTS):
        choices = [] if number % 5 == 4 else WORDS if number % 3 == 2 else CHOICES
        target = choices[number % 2] if choices else f"It is {text[:4]}."
        question = {"messages": [{"role": "user", "content": f"Which letter?\n\n{text}"}]}
        rows.append({"input": question, "choices": choices, "target": target})
    return rows


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def codes(*shape: int, salt: int = 0) -> Tensor:
    """Whole numbers from 0 to 255 without any order to be seen, by arithmetic that no version of anything changes."""
    x = torch.arange(math.prod(shape), dtype=torch.int64) + salt * 1_000_003
    for factor in (2_654_435_761, 2_246_822_519):
        x = x * factor % (1 << 32)
        x = x ^ (x >> 15)
    return (x >> 8 & 255).view(shape)


def fractions(*shape: int, salt: int = 0) -> Tensor:
    """Multiples of 1/256 from -1/2 on and below 1/2: each of them is a float32 and a bfloat16."""
    return (codes(*shape, salt=salt) - 128).float() / 256


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """Of all tensors' bytes, one after the other."""
    return sha256(b"".join(each.detach().contiguous().view(torch.uint8).numpy().tobytes() for each in tensors))


def norm(tensor: Tensor) -> float:
    """A norm in which every place has a weight of its own, so that the same entries in another order have another."""
    flat = tensor.detach().double().flatten()
    return float((flat.square() * torch.linspace(1, 2, len(flat), dtype=torch.float64)).sum().sqrt())


class LocalEngine:
    """The background commands of an engine in this process, for what else talks to the engine's own process."""

    def __init__(self, session: OperationSession) -> None:
        self._session = session

    def run(self, operation: Operation[R, P], on_progress: Callable[[P], None] = lambda _: None) -> R:
        """What an operation finally returns."""
        steps = self._session.begin(operation)
        while True:
            try:
                progress = next(steps)
            except StopIteration as stop:
                result: R = stop.value
                return result
            if progress is not None:
                on_progress(progress)

    async def call(self, operation: Operation[R, P]) -> R:
        return self.run(operation)


def finished(steps: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def adapters(folder: Path) -> tuple[Path, Path]:
    """A revision of engine llama.cpp: an adapter on some layers, and a control vector."""
    adapter, control = folder / "adapter.gguf", folder / "control.gguf"
    wide, high = tiny_model.N_EMBD, tiny_model.N_FF
    shapes = {"blk.1.attn_v": (wide // 2, wide), "blk.3.attn_output": (wide, wide), "blk.3.ffn_down": (wide, high)}
    pairs = {
        f"{name}.weight": (fractions(4, n_in, salt=i) / 2, fractions(n_out, 4, salt=20 + i))
        for i, (name, (n_out, n_in)) in enumerate(shapes.items())
    }
    write_adapter(adapter, "llama", 4.0, pairs)
    write_control(control, (fractions(tiny_model.N_BLOCKS - 1, wide, salt=9) / 2).numpy())
    return adapter, control


BARS = Architecture(
    "bars", (1, 12, 12), (Conv(4, 3, padding=1), ReLU(), MaxPool(2), Flatten(), Linear(16), ReLU(), Linear(4))
)
CLASSES = ("top", "upper", "lower", "bottom")
SCALING = ClassifierHeader(BARS, CLASSES, -7, 127.5, 127.5)


def network() -> Int8Network:
    """Made of integers alone, so that no floating-point step can make another of it elsewhere."""
    parameters = []
    for p in BARS.parameters():
        mantissa = (codes(*p.shape, salt=p.index) - 128).clamp(-127, 127).to(torch.int8)
        parameters.append(Int8Tensor(mantissa, -9))
    return Int8Network(BARS, parameters)


def classifier(folder: Path) -> Path:
    path = folder / "bars.safetensors"
    save_int8(network(), path, SCALING.metadata())
    return path


def images(n: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 images of one bright bar on noise, and their classes."""
    x, labels = codes(n, 1, 12, 12, salt=100 + salt) % 90, codes(n, salt=200 + salt) % 4
    for image, label in zip(x, labels.tolist(), strict=True):
        image[0, 3 * label : 3 * label + 2, 2:10] += 130
    return x.to(torch.uint8), labels


def array(image: Tensor) -> dict[str, Any]:
    """An image as clients send it."""
    data = base64.b64encode(image.numpy().tobytes()).decode()
    return {"array": {"dtype": "uint8", "shape": list(image.shape), "data": data}}
