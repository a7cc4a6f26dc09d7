"""`agentd install-service`: the systemd units, put in place for the environment this runs in, and taken away again."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from agentd import durable
from agentd.errors import ServiceNotInstalled

UNITS = ("agentd.service", "agentd.socket", "agentd-admin.socket")
OPTIONAL = ("agentd-tcp.socket",)  # put in place; who wants it enables it
_SYSTEM = Path("etc/systemd/system")
_DROP_INS = _SYSTEM / "agentd.service.d"
_SYSUSERS = Path("etc/sysusers.d/agentd.conf")
CONFIG = Path("etc/agentd/agentd.yaml")
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # from the service: ProtectHome=, PrivateTmp=
_NEWER = 254  # the first systemd that knows all of newer.conf


def install(root: Path, *, gpu: bool = False) -> list[Path]:
    """Puts everything in place under `root` and returns what was written; on the running system (`/`) starts it too.

    The configuration is written only if there is none. Raises ServiceNotInstalled.
    """
    source = _source()
    program = Path(sys.executable).absolute()
    if hidden := next((place for place in _HIDDEN if program.is_relative_to(place)), None):
        print(f"note: {program} is under {hidden}, which the service does not see; install agentd under /opt or /usr")
    files = dict(_files(source, program, gpu))
    if not (root / CONFIG).exists():
        files[CONFIG] = (source.parent / "configs" / "agentd.yaml").read_text(encoding="utf-8")
    try:
        written = [_write(root / name, text) for name, text in files.items()]
        if not gpu:  # of an earlier installation with one
            (root / _DROP_INS / "gpu.conf").unlink(missing_ok=True)
    except OSError as error:
        raise ServiceNotInstalled(f"{error.filename}: {error.strerror}") from None
    for path in written:
        print(path)
    if root == Path("/"):
        _run("systemd-sysusers", str(root / _SYSUSERS))
        _run("systemctl", "daemon-reload")
        _run("systemctl", "enable", "--now", "agentd.socket", "agentd-admin.socket", "agentd.service")
    return written


def uninstall(root: Path) -> list[Path]:
    """Stops the service and removes what `install` wrote, except for the configuration; the state stays too."""
    if root == Path("/"):
        _run("systemctl", "disable", "--now", *UNITS, *OPTIONAL, check=False)
    removed = []
    try:
        for name in [*(_SYSTEM / unit for unit in (*UNITS, *OPTIONAL)), *_drop_ins(), _SYSUSERS]:
            if (root / name).exists():
                (root / name).unlink()
                removed.append(root / name)
        if (root / _DROP_INS).is_dir() and not any((root / _DROP_INS).iterdir()):
            (root / _DROP_INS).rmdir()
    except OSError as error:
        raise ServiceNotInstalled(f"{error.filename}: {error.strerror}") from None
    if root == Path("/"):
        _run("systemctl", "daemon-reload", check=False)
    for path in removed:
        print(f"removed {path}")
    print(f"kept: {root / CONFIG}, and the state in {root / 'var/lib/agentd'}")
    return removed


def _files(source: Path, program: Path, gpu: bool) -> Iterator[tuple[Path, str]]:
    for unit in (*UNITS, *OPTIONAL):
        yield _SYSTEM / unit, (source / unit).read_text(encoding="utf-8")
    yield _SYSUSERS, (source / "agentd.sysusers").read_text(encoding="utf-8")
    start = f"{_quoted(program)} -m agentd run --config /{CONFIG}"
    yield (
        _DROP_INS / "installed.conf",
        f"# Written by `agentd install-service`.\n[Service]\nExecStart=\nExecStart={start}\n",
    )
    if gpu:
        yield _DROP_INS / "gpu.conf", (source / "agentd.service.d" / "gpu.conf").read_text(encoding="utf-8")
    if (_systemd_version() or 0) >= _NEWER:
        yield _DROP_INS / "newer.conf", (source / "agentd.service.d" / "newer.conf").read_text(encoding="utf-8")


def _drop_ins() -> list[Path]:
    return [_DROP_INS / name for name in ("installed.conf", "gpu.conf", "newer.conf")]


def _source() -> Path:
    """systemd/ of a checkout, or of an installed wheel."""
    for base in (Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "agentd"):
        if (base / "systemd" / UNITS[0]).is_file():
            return base / "systemd"
    raise ServiceNotInstalled("the unit files are not there; install agentd from its wheel or its sources")


def _systemd_version() -> int | None:
    if shutil.which("systemctl") is None:
        return None
    words = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout.split()
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else None


def _quoted(path: Path) -> str:
    """As systemd.service(5) wants it: % starts a specifier, quotes keep spaces together."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if " " in text else text


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with durable.replacement(path, durable=False) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o644)
    return path


def _run(*command: str, check: bool = True) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServiceNotInstalled(f"{command[0]}: {error.strerror}") from None
    if check and result.returncode:
        raise ServiceNotInstalled(f"`{' '.join(command)}` failed: {result.stderr.strip() or result.returncode}")
