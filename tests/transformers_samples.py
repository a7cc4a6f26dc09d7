"""Tiny models for engine transformers, and a daemon that serves one."""

from pathlib import Path
from typing import Any

from daemon_process import DaemonProcess

from tools import tiny_model

SETTINGS: dict[str, Any] = {
    "engine": "transformers",
    "model": {"dtype": "float32", "threads": 1, "context": 512},
    "serve": {"slots": 2},
    "adapt": {
        "enabled": False,
        "method": "mezo",
        "zo_steps": 60,
        "trial": {"duration": "300ms", "max_latency": 100},
        "gate": {"alpha": 0.4, "min_holdout": 5, "max_drift": 100},
    },
}
LETTERS = {"yes": "a", "no": "z"}


def gguf(folder: Path) -> Path:
    return tiny_model.write(folder / "tiny.gguf")


def directory(folder: Path, gguf: Path) -> Path:
    """The same model as a directory of transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    given = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    target = folder / "tiny"
    read = AutoModelForCausalLM.from_pretrained(**given)
    described = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(**given).save_pretrained(str(target))
    return target


def teach(daemon: DaemonProcess, n: int = 120) -> None:
    """A task that even a random model can learn: which of two letters a text is made of."""
    lines = []
    for i in range(n):
        label = "yes" if i % 2 else "no"
        text = LETTERS[label] * (5 + i % 7) + f" {i}"
        lines.append(f'{{"task": "reviews", "text": "{text}", "label": "{label}"}}')
    answer = daemon.post("/v1/examples", "\n".join(lines).encode())
    assert answer.status == 200, answer.body
