"""Tiny models for engine transformers, a daemon that serves one, and what tests have it do."""

from pathlib import Path
from typing import Any

from daemon_process import DaemonProcess, eventually

from agentd.ctl.app import run
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


def adapt(daemon: DaemonProcess, **options: Any) -> dict[str, Any]:
    """A pass with these options; how it ended."""
    answer = daemon.post("/admin/adapt", options, admin=True)
    assert answer.status == 202, answer.body
    return finished(daemon, answer.json["pass"])


def finished(daemon: DaemonProcess, number: int) -> dict[str, Any]:
    eventually(lambda: daemon.get("/admin/progress", admin=True).json["pass"]["done"], 60)
    row: dict[str, Any] = daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]
    return row


def said(daemon: DaemonProcess) -> list[tuple[str, list[float]]]:
    """Answers with the log-probabilities of their tokens: another weight anywhere shows."""
    found = []
    for text in ("What now?", "aaaaaa", "zzzzzz"):
        choice = daemon.ask(text, logprobs=True, max_tokens=3).json["choices"][0]
        found.append((choice["message"]["content"], [entry["logprob"] for entry in choice["logprobs"]["content"]]))
    return found


def manifest(daemon: DaemonProcess, revision: int) -> dict[str, Any]:
    found: dict[str, Any] = daemon.get(f"/admin/revisions/{revision}", admin=True).json["manifest"]
    return found


def roll(daemon: DaemonProcess, revision: int) -> None:
    answer = daemon.post("/admin/rollback", {"revision": revision}, admin=True)
    assert answer.status == 200, answer.body


def ctl(daemon: DaemonProcess, *arguments: str) -> int:
    return run([*arguments, "--socket", str(daemon.admin)])


def clean(daemon: DaemonProcess) -> None:
    """As if the disk had been cleaned: weights are made again from what revisions keep."""
    for image in (daemon.state / "weights").glob("weights-*"):
        image.unlink()
