"""What a daemon keeps of prompts: over restarts, and not of what is forgotten or private."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import tiny_model
from tools.daemon import DaemonProcess, eventually

SYSTEM = " ".join(f"Lamp {i} is in room {i + 1}." for i in range(40))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tiny_model.write(tmp_path / "tiny.gguf"), {"serve": {"slots": 1}}) as process:
        yield process


def cached(daemon: DaemonProcess, question: str, **options: object) -> tuple[int, str]:
    """Tokens that were not computed for a question about SYSTEM, and the id of its answer."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 2, "temperature": 0, **options}
    answer = daemon.post("/v1/chat/completions", body).json
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["id"]


def files(daemon: DaemonProcess) -> list[Path]:
    return [path for path in (daemon.state / "prefixes").glob("*") if not path.name.startswith(".")]


def test_a_prefix_is_there_after_a_restart_and_after_a_kill(daemon: DaemonProcess) -> None:
    daemon.start()
    assert cached(daemon, "Where is lamp 3?")[0] == 0
    assert eventually(lambda: files(daemon), 30)
    assert daemon.stop() == 0
    daemon.start()
    assert cached(daemon, "And lamp 4?")[0] > 200
    daemon.kill()
    daemon.start()
    assert cached(daemon, "And lamp 5?")[0] > 200


def test_forgetting_anything_leaves_no_prefix(daemon: DaemonProcess) -> None:
    daemon.start()
    _, id = cached(daemon, "Where is lamp 3?")
    assert eventually(lambda: files(daemon), 30)
    assert daemon.post("/admin/forget", {"inferences": [id], "dry_run": True}, admin=True).status == 200
    assert files(daemon)
    assert daemon.post("/admin/forget", {"inferences": [id]}, admin=True).status == 200
    assert not files(daemon)
    assert cached(daemon, "And lamp 4?")[0] == 0


def test_what_is_not_stored_leaves_no_prefix(daemon: DaemonProcess) -> None:
    daemon.start()
    cached(daemon, "Where is lamp 3?", store=False)
    daemon.ask("Something else. " * 60)  # takes the slot
    assert cached(daemon, "And lamp 4?")[0] < 8  # the template's beginning, which the slot has
