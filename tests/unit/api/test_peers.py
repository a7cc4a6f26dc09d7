"""Who is at the other end: what the kernel says of real sockets."""

import os
import socket
from pathlib import Path

import pytest

from agentd.api.peers import loopback_credentials


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_tcp_client_of_this_machine_has_its_users_uid(
    family: socket.AddressFamily, host: str, tmp_path: Path
) -> None:
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        listener.listen()
        client.connect(listener.getsockname())
        with listener.accept()[0] as accepted:
            peer, own = accepted.getpeername(), accepted.getsockname()
            assert loopback_credentials(peer, own) == f"uid:{os.getuid()}"
            assert loopback_credentials((host, 1), own) is None  # no one's port
            assert loopback_credentials(peer, own, tmp_path) is None  # no /proc
            client.close()
            assert loopback_credentials(peer, own) is None
