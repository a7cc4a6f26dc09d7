"""Passes over a tiny model in a real daemon: its settings, what it learns from, and what tests ask of it."""

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from agentd import ids
from agentd.ctl.app import run
from agentd.store.database import Store
from tools import tiny_model
from tools.daemon import DaemonProcess, eventually

# A random model forgets nothing and learns little: the gate looks for any improvement.
_ADAPT: dict[str, Any] = {
    "enabled": False,
    "trial": {"duration": "300ms", "max_latency": 100},
    "gate": {"alpha": 0.4, "min_holdout": 5, "max_drift": 100, "max_skill_loss": 1},
}
SETTINGS: dict[str, Any] = {
    "engine": "transformers",
    "model": {"dtype": "float32", "threads": 1, "context": 512},
    "serve": {"slots": 2},
    "adapt": {**_ADAPT, "method": "mezo", "zo_steps": 60},
}
LLAMACPP: dict[str, Any] = {"serve": {"slots": 2}, "adapt": _ADAPT}
LETTERS = {"yes": "a", "no": "z"}
# By key, what daemons of this run of the tests, in whichever worker, found their machine and model to do.
_MEASURED = Path(
    tempfile.gettempdir(), f"agentd-measured-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}.json"
)


class Learner(DaemonProcess):
    """A daemon that finds in its database, as after a restart, what one before it has measured for passes of the same
    model: that takes seconds of a core, and is the matter of test_measurements.py alone."""

    def start(self, *, wait: bool = True) -> DaemonProcess:
        path = self.state / "agentd.db"
        if not path.exists() and (known := _measured()):
            self.state.mkdir(mode=0o700, exist_ok=True)
            with closing(Store(path)) as store:
                rows = [[key, json.dumps(facts), ids.now()] for key, facts in known.items()]
                store.raw(lambda db: db.executemany("INSERT INTO measurements VALUES (?, ?, ?)", rows))
                store.raw(lambda db: db.commit())
        return super().start(wait=wait)

    def close(self) -> None:
        self.kill()
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(self.state / "agentd.db")) as db:
            found = {key: json.loads(facts) for key, facts in db.execute("SELECT key, facts FROM measurements")}
            if found.keys() - (known := _measured()).keys():
                new = _MEASURED.with_suffix(f".{os.getpid()}")
                new.write_text(json.dumps({**known, **found}))
                new.replace(_MEASURED)
        super().close()


def _measured() -> dict[str, dict[str, Any]]:
    with suppress(FileNotFoundError):
        known: dict[str, dict[str, Any]] = json.loads(_MEASURED.read_text())
        return known
    return {}


def gguf(folder: Path) -> Path:
    return tiny_model.write(folder / "tiny.gguf")


def directory(folder: Path, gguf: Path) -> Path:
    """The same model as a directory of transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    arguments = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    target = folder / "tiny"
    read = AutoModelForCausalLM.from_pretrained(**arguments)
    described = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(**arguments).save_pretrained(str(target))
    return target


def examples(n: int, first: int = 0, length: int = 8, letters: dict[str, str] = LETTERS) -> bytes:
    """A task that even a random model can learn: which of two letters a text is made of, `length` of them or more."""
    lines = []
    for i in range(first, first + n):
        label = "yes" if i % 2 else "no"
        text = letters[label] * (length + i % 7) + f" {i}"
        lines.append(json.dumps({"task": "reviews", "text": text, "label": label}))
    return "\n".join(lines).encode()


def teach(daemon: DaemonProcess, n: int = 120) -> None:
    answer = daemon.post("/v1/examples", examples(n, length=5))
    assert answer.status == 200, answer.body


def begin(daemon: DaemonProcess, **options: Any) -> int:
    """Starts a pass; returns its number."""
    answer = daemon.post("/admin/adapt", options, admin=True)
    assert answer.status == 202, answer.body
    return int(answer.json["pass"])


def adapt(daemon: DaemonProcess, **options: Any) -> dict[str, Any]:
    """A pass with these options; how it ended."""
    return finished(daemon, begin(daemon, **options))


def progress(daemon: DaemonProcess) -> dict[str, Any]:
    row: dict[str, Any] = daemon.get("/admin/progress", admin=True).json["pass"] or {"done": False, "phase": None}
    return row


def finished(daemon: DaemonProcess, number: int, timeout: float = 60) -> dict[str, Any]:
    """The pass's row, once it has ended."""
    eventually(lambda: daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]["finished_at"], timeout)
    # how long its phases took is written at its very end
    eventually(lambda: (daemon.get("/admin/progress", admin=True).json["pass"] or {"done": True})["done"], timeout)
    row: dict[str, Any] = daemon.get(f"/admin/passes/{number}", admin=True).json["pass"]
    return row


def said(daemon: DaemonProcess) -> list[tuple[str, list[float]]]:
    """Answers with the log-probabilities of their tokens: another weight anywhere shows."""
    replies = []
    for text in ("What now?", "aaaaaa", "zzzzzz"):
        choice = daemon.ask(text, logprobs=True, max_tokens=3).json["choices"][0]
        replies.append((choice["message"]["content"], [entry["logprob"] for entry in choice["logprobs"]["content"]]))
    return replies


def manifest(daemon: DaemonProcess, revision: int) -> dict[str, Any]:
    tree: dict[str, Any] = daemon.get(f"/admin/revisions/{revision}", admin=True).json["manifest"]
    return tree


def roll(daemon: DaemonProcess, revision: int) -> None:
    answer = daemon.post("/admin/rollback", {"revision": revision}, admin=True)
    assert answer.status == 200, answer.body


def ctl(daemon: DaemonProcess, *arguments: str) -> int:
    return run([*arguments, "--socket", str(daemon.admin)])


def clean(daemon: DaemonProcess) -> None:
    """As if the disk had been cleaned: weights are made again from what revisions keep."""
    for image in (daemon.state / "weights").glob("weights-*"):
        image.unlink()


@contextmanager
def committed(model: Path, **wishes: Any) -> Iterator[DaemonProcess]:
    """A daemon that has committed a pass, for which `wishes` say how."""
    with DaemonProcess(model, SETTINGS) as daemon:
        daemon.start()
        teach(daemon)
        row = adapt(daemon, **wishes)
        assert row["state"] == "committed", row["reason"]
        yield daemon


def assert_made_again(daemon: DaemonProcess, revision: int) -> None:
    """What serves comes back after a rollback, made again from what its revision keeps."""
    new = said(daemon)
    roll(daemon, 0)
    assert said(daemon) != new
    clean(daemon)
    roll(daemon, revision)
    assert said(daemon) == new


def assert_survives_a_kill(daemon: DaemonProcess) -> None:
    """What revision 1 says comes back after a rollback, and after a kill."""
    assert_made_again(daemon, 1)
    new = said(daemon)
    daemon.kill()
    clean(daemon)
    daemon.start()
    assert daemon.status()["revision"] == 1
    assert said(daemon) == new
