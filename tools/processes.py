"""A daemon of a tool's own: its model, state, sockets and log in a directory that goes away with it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from agentd.ctl.client import Daemon
from agentd.ctl.errors import CtlError
from tools import tiny_model

ROOT = Path(__file__).resolve().parent.parent
_START = 120.0  # seconds


class TinyDaemon:
    """`python -m agentd` on a tiny model, or on `model`. `settings` are laid over those of a quiet daemon."""

    def __init__(self, model: Path | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="agentd-", dir="/tmp"))  # socket paths must be short
        self.state, self.log = self.directory / "state", self.directory / "log"
        self.api, self.admin = self.directory / "api.sock", Daemon(self.directory / "admin.sock", timeout=120)
        self._model = model or tiny_model.write(self.directory / "tiny.gguf")
        self._config = self.directory / "agentd.yaml"
        own: dict[str, Any] = {
            "model": {"path": str(self._model), "context": 1024},
            "serve": {"socket": str(self.api), "slots": 2},
            "state": {"dir": str(self.state)},
            "adapt": {"enabled": False},
            "tasks": {"reviews": {"choices": ["yes", "no"], "prompt": "Was it good?\n\n{text}"}},
        }
        for section, values in (settings or {}).items():
            own[section] = {**own.get(section, {}), **values}
        self._config.write_text(json.dumps(own))  # JSON is YAML
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TinyDaemon":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Starts it and returns once it serves. Raises RuntimeError with its log if it does not."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AGENTD_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agentd", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment,
            )
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.admin.get("/admin/status")["state"] == "serving":
                    return
            except CtlError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"the daemon does not serve:\n{self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def pids(self) -> dict[str, int]:
        """The daemon, and its engine and trainer if they run."""
        assert self.process is not None
        found = {"daemon": self.process.pid}
        for child in psutil.Process(self.process.pid).children():
            try:
                command = child.cmdline()
            except psutil.Error:
                continue
            for name, module in (("engine", "agentd.engine.runner"), ("trainer", "agentd.trainer")):
                if module in command and "--probe" not in command:
                    found[name] = child.pid
        return found
