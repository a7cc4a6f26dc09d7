"""A real HTTP server on a real UNIX socket that answers agentctl with recorded JSON, and runs agentctl against it."""

import json
import os
import pty
import select
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded.json").read_text())


# what would change how agentctl prints, wherever the tests run
_LEFT_OUT = ("NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED", "AGENTD_SOCKET")


class Answer:
    """One scripted answer: a JSON object, bytes as they are, or a list of server-sent events."""

    def __init__(self, body: Any, status: int = 200) -> None:
        self.body = body
        self.status = status


class Request:
    def __init__(self, method: str, target: str, body: bytes) -> None:
        self.method = method
        self.path = urlsplit(target).path
        self.query = dict(parse_qsl(urlsplit(target).query))
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedDaemon:
    """Answers from recorded.json unless `on` says otherwise; `requests` is what arrived."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="agentctl-")
        self.socket = Path(self._directory.name) / "admin.sock"
        self.requests: list[Request] = []
        self.asked = threading.Event()
        self._script: dict[str, list[Answer]] = {name: [Answer(body)] for name, body in RECORDED.items()}

    def __enter__(self) -> "ScriptedDaemon":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._directory.cleanup()

    def start(self) -> None:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                script._answer(self, Request(self.command, self.path, body))

            do_GET = do_POST = answer  # noqa: N815  http.server's names

            def log_message(self, format: str, *args: Any) -> None:
                return None

        self._server = socketserver.ThreadingUnixStreamServer(str(self.socket), Handler)
        self._server.daemon_threads = True
        self.socket.chmod(0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.socket.unlink()

    def on(self, name: str, *answers: Answer) -> None:
        """Scripts the answers to e.g. `GET /admin/status`, one after the other; the last one stays."""
        self._script[name] = list(answers)

    def refuse(self, name: str, status: int, message: str, code: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "code": code, "param": None}
        self.on(name, Answer({"error": error}, status))

    def asked_for(self, name: str) -> list[Request]:
        return [request for request in self.requests if f"{request.method} {request.path}" == name]

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        self.requests.append(request)
        name = f"{request.method} {request.path}"
        missing = {"error": {"message": f"there is no {request.path!r}", "type": "t", "code": "not_found"}}
        answers = self._script.get(name, [Answer(missing, 404)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        handler.send_response(answer.status)
        if isinstance(answer.body, list):
            data = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in answer.body) + b"data: [DONE]\n\n"
        else:
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
        self.asked.set()

    def environment(self, **extra: str) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
        variables |= {
            "AGENTD_ADMIN_SOCKET": str(self.socket),
            "TERM": "xterm-256color",
            "COLUMNS": "150",
            "LINES": "40",
        }
        return variables | {"PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "error"} | extra

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
        """Runs agentctl with pipes."""
        return subprocess.run(
            command(arguments),
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=60,
            env=self.environment(**environment),
        )

    def on_terminal(
        self, *arguments: str, typed: str = "", talk: Sequence[tuple[str, str]] = (), **environment: str
    ) -> tuple[int, str]:
        """Runs agentctl on a pseudo-terminal; the exit code, and all that it showed. `talk` is what is typed each time
        that something is shown, in turn: (what is shown, what is typed then)."""
        leader, follower = pty.openpty()
        if typed:
            os.write(leader, typed.encode())
        process = subprocess.Popen(
            command(arguments),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=self.environment(**environment),
        )
        os.close(follower)
        output, heard, turns = b"", 0, list(talk)
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                if select.select([leader], [], [], 1)[0]:
                    try:
                        piece = os.read(leader, 65536)
                    except OSError:  # EIO: the program has closed its terminal
                        break
                    if not piece:
                        break
                    output += piece
                while turns and (at := output.find(turns[0][0].encode(), heard)) >= 0:
                    heard = at + len(turns[0][0].encode())
                    os.write(leader, turns.pop(0)[1].encode())
            return process.wait(timeout=10), output.decode().replace("\r\n", "\n")
        finally:
            process.kill()
            process.wait()
            os.close(leader)


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "agentd.ctl.app", *arguments]
