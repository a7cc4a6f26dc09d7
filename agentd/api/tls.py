"""TLS from files: a certificate and its key, checked at the start and read again on SIGHUP."""

import ssl
from pathlib import Path

from agentd.errors import InvalidConfig


class Tls:
    """`context` is what connections are made with; after `reload` new ones have what the files hold now.

    Raises InvalidConfig, saying which file is wrong and why.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self.context = self._read(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        self.context.set_alpn_protocols(["http/1.1"])

    def reload(self) -> None:
        """Raises InvalidConfig, and what was read before stays."""
        self._read(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        self._read(self.context)

    def _read(self, context: ssl.SSLContext) -> ssl.SSLContext:
        certificate, key = self._files
        for name, path in (("certificate", certificate), ("key", key)):
            try:
                path.read_bytes()
            except OSError as error:
                raise InvalidConfig("the configuration", [f"serve.tls.{name}: {path}: {error.strerror}"]) from None
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except (ssl.SSLError, _Encrypted) as error:
            raise InvalidConfig("the configuration", [_reason(error, certificate, key)]) from None
        return context


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    """Without this OpenSSL asks at a terminal, which a daemon has none of."""
    raise _Encrypted


def _reason(error: Exception, certificate: Path, key: Path) -> str:
    if isinstance(error, _Encrypted):
        return f"serve.tls.key: {key} is encrypted with a password; take it out: openssl pkey -in {key} -out NEW"
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return f"serve.tls.key: {key} is not the key of the certificate {certificate}"
    return f"serve.tls: {certificate} and {key} are no certificate and key in PEM: {error}"
