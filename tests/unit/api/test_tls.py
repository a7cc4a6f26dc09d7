"""TLS from files: what is wrong with them is said, and they are read again."""

import contextlib
import ssl
from pathlib import Path

import pytest

from agentd.api.tls import Tls
from agentd.errors import InvalidConfig
from tests.support.certificates import certificate


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path)
    other = certificate(tmp_path, "other")[1]
    locked = certificate(tmp_path, "locked", password="secret")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("hello")
    Tls(crt, key)
    for files, reason in (
        ((tmp_path / "none", key), r"serve\.tls\.certificate: .*none: No such file"),
        ((crt, tmp_path), r"serve\.tls\.key: .*Is a directory"),
        ((crt, other), "other.key is not the key of the certificate"),
        ((nonsense, key), "are no certificate and key in PEM"),
        ((crt, nonsense), "are no certificate and key in PEM"),
        (locked, "encrypted with a password; take it out"),
    ):
        with pytest.raises(InvalidConfig, match=reason):
            Tls(*files)


def test_a_reload_takes_new_files_and_leaves_the_old_ones_where_they_are_bad(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path)
    tls = Tls(crt, key)
    first = presented(tls)
    crt.write_text("hello")
    with pytest.raises(InvalidConfig):
        tls.reload()
    assert presented(tls) == first
    certificate(tmp_path)
    tls.reload()
    assert presented(tls) not in (first, None)


def presented(tls: Tls) -> bytes | None:
    """The certificate that a client is shown."""
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_end = tls.context.wrap_bio(to_server, to_client, server_side=True)
    client_end = client.wrap_bio(to_client, to_server)
    for _ in range(4):
        for end in (client_end, server_end):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return client_end.getpeercert(binary_form=True)
