"""Real daemons for these tests: agentd's own environment runs them, this one has only Flower. Set AGENTD_PYTHON to its
Python where that is not ../.venv/bin/python; without any, tests that need a daemon are skipped."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("AGENTD_PYTHON") or ROOT / ".venv" / "bin" / "python")


class ServedBoard:
    """A daemon in a process of the other environment, which ends with it."""

    def __init__(self, settings: dict[str, Any], examples: int, first: int) -> None:
        command = [str(PYTHON), "-m", "flower.tests.serve_board", json.dumps(settings), str(examples), str(first)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.admin = Path(self._answer()["admin"])

    def do(self, what: str) -> dict[str, Any]:
        """`kill`, `start`, or `status`."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the daemon's process has ended; see above"
        tree: dict[str, Any] = json.loads(line)
        return tree


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., ServedBoard]]:
    if not PYTHON.exists():
        pytest.skip(f"no agentd to test with: {PYTHON} does not exist (make setup, or AGENTD_PYTHON)")
    boards: list[ServedBoard] = []

    def start(settings: dict[str, Any] | None = None, examples: int = 60, first: int = 0) -> ServedBoard:
        boards.append(ServedBoard(settings or {}, examples, first))
        return boards[-1]

    yield start
    for board in boards:
        board.close()
