"""What stands in for a camera: it has images classified, and says afterwards what they were."""

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """One answer: when it came, in seconds since the start, whether it was right, and which revision gave it."""

    at: float
    right: bool
    revision: int
    angle: int


class Camera:
    """One connection to the daemon's API socket, kept open."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._connection = self._connected()

    def classify(self, image: Tensor) -> dict[str, Any]:
        """The daemon's answer to a uint8 image (1, 28, 28)."""
        shape = ",".join(map(str, image.shape))
        headers = {"Content-Type": "application/octet-stream"}
        return self._post(f"/v1/classify?shape={shape}&dtype=uint8", image.numpy().tobytes(), headers)

    def correct(self, inference: str, label: str) -> None:
        """Feedback: what it was."""
        body = {"inference_id": inference, "kind": "label", "value": label, "source": "program"}
        self._post("/v1/feedback", json.dumps(body).encode(), {"Content-Type": "application/json"})

    def close(self) -> None:
        self._connection.close()

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        self._connection.request("POST", path, body, headers)
        response = self._connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        if response.status >= 400:
            raise RuntimeError(f"{path} was answered with {response.status}: {answer['error']['message']}")
        return answer

    def _connected(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("agentd", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(self._path))
        return connection
