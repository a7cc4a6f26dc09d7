"""A daemon of the demo's own: its state, its sockets, its log; ended with the demo."""

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
from types import TracebackType
from typing import Any

from agentd.ctl.client import Daemon
from agentd.ctl.errors import CtlError

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ROOT / "configs" / "reviews.yaml"
_START = 120.0  # seconds a model may take to load


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


class DemoDaemon:
    """Starts `agentd` with `config` and passes only on demand. `state` None: a directory that goes away.

    `settings` are environment variables laid over those that the demo sets.
    """

    def __init__(
        self,
        state: Path | None,
        trial_seconds: float,
        *,
        config: Path = CONFIG,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self._settings = config, dict(settings or {})
        self._temporary = None if state else Path(tempfile.mkdtemp(prefix="agentd-demo-"))
        self.state = state or self._temporary or Path()
        self._trial = trial_seconds
        self._sockets = Path(tempfile.mkdtemp(prefix="agentd-"))
        self.socket = self._sockets / "api.sock"
        self.admin = Daemon(self._sockets / "admin.sock")
        self.log = self.state / "daemon.log"

    def __enter__(self) -> "DemoDaemon":
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {
            "AGENTD_STATE_DIR": str(self.state),
            "AGENTD_SERVE_SOCKET": str(self.socket),
            "AGENTD_SERVE_ADMIN_SOCKET": str(self.admin.path),
            "AGENTD_ADAPT_ENABLED": "false",
            "AGENTD_ADAPT_TRIAL_DURATION": f"{self._trial}s",
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentd", "--config", str(self._config), "run"],
                env={**os.environ, **environment, **self._settings},
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)
        if self._temporary and error is None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_serving(self) -> dict[str, Any]:
        """Returns its status. Raises DemoFailed with the end of its log."""
        ends = time.monotonic() + _START
        while time.monotonic() < ends and self._process.poll() is None:
            try:
                status = self.admin.get("/admin/status")
            except CtlError:
                status = {}
            if status.get("state") == "serving":
                return status
            time.sleep(0.1)
        raise DemoFailed(f"the daemon does not serve; its log, {self.log}, ends with:\n{self._end_of_log()}")

    def _end_of_log(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def reviews(split: str) -> list[dict[str, Any]]:
    """Rows {"text", "label": yes | no} of tools/data/movie_reviews.jsonl."""
    answers = {"positive": "yes", "negative": "no"}
    with (ROOT / "tools" / "data" / "movie_reviews.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{"text": row["text"], "label": answers[row["label"]]} for row in rows if row["split"] == split]
