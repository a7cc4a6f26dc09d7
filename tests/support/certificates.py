"""Certificates for localhost, made on the spot."""

import shutil
import subprocess
from pathlib import Path

import pytest


def certificate(folder: Path, name: str = "tls", password: str | None = None) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key, which `password` encrypts."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    locked = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(crt), *locked),
        ],
        check=True,
        capture_output=True,
    )
    return crt, key
