"""Packages of agentd: `python -m tools.package wheel` (and its sdist), `python -m tools.package deb`.

The Debian package is for the machine's own architecture and for the Python that it is built with. It holds all
dependencies in a private environment in /opt/agentd, pinned by constraints.txt; the extras mcp and otel are in it, for
there is no pip in it that could add them. `apt remove` leaves configuration and state, `apt purge` takes both.
"""

import argparse
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from agentd import __version__
from agentd.host.service import OPTIONAL, UNITS
from tools.setup import without_amx

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = Path("opt/agentd")
STATE = ("/var/lib/agentd", "/var/lib/private/agentd", "/var/cache/agentd", "/var/cache/private/agentd")

CONTROL = """Package: agentd
Version: {version}
Architecture: {architecture}
Maintainer: the agentd authors <agentd@localhost>
Depends: python{python}, libgomp1, libstdc++6, systemd
Installed-Size: {kilobytes}
Section: net
Priority: optional
Description: language model daemon that learns from feedback
 agentd serves a language model on a board, collects corrections of its answers, and learns from them in about the
 memory that serving takes. All of its Python dependencies are in /opt/agentd.
"""
POSTINST = """#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
[ -z "$DPKG_ROOT" ] || exit 0
# The service may not write there, and would compile everything at each start.
/opt/agentd/bin/python -m compileall -q /opt/agentd/lib || true
[ -d /run/systemd/system ] || exit 0
systemd-sysusers /usr/lib/sysusers.d/agentd.conf
systemctl daemon-reload
if [ -z "$2" ]; then
    echo "agentd: name a model in /etc/agentd/agentd.yaml, or fetch the default one: agentd fetch-model; then"
    echo "systemctl enable --now agentd.socket agentd-admin.socket agentd.service"
else
    systemctl try-restart agentd.service
fi
"""
PRERM = """#!/bin/sh
set -e
[ "$1" = remove ] || exit 0
[ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ] || exit 0
systemctl disable --now {units}
"""
POSTRM = """#!/bin/sh
set -e
if [ "$1" = remove ]; then rm -rf "$DPKG_ROOT/opt/agentd"; fi
if [ "$1" = purge ]; then
    for folder in {state}; do rm -rf "$DPKG_ROOT$folder"; done
    rmdir "$DPKG_ROOT/etc/agentd" 2>/dev/null || true
fi
if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("wheel", "deb"))
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for what is built (%(default)s)")
    parser.add_argument(
        "--without-dependencies", action="store_true", help="deb: agentd alone in /opt/agentd, to look at or to test"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "wheel":
        print(*(path for path in (build_sdist(options.out), build_wheel(options.out))), sep="\n")
    else:
        print(build_deb(options.out, dependencies=not options.without_dependencies))
    return 0


def build_wheel(out: Path) -> Path:
    return _built("wheel", out)


def build_sdist(out: Path) -> Path:
    return _built("sdist", out)


def _built(what: str, out: Path) -> Path:
    """What setuptools makes of a copy of the sources, in which it leaves its own files."""
    with tempfile.TemporaryDirectory(prefix="agentd-package-") as folder:
        copy, made = Path(folder) / "sources", Path(folder) / "made"
        names = ("agentd", "systemd", "configs", "pyproject.toml", "README.md", "LICENSE")
        for source in map(ROOT.joinpath, names):
            if source.is_dir():
                shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / source.name)
        made.mkdir()
        script = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
        command = [sys.executable, "-W", "ignore", "-c", script, str(made)]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"the {what} was not built:\n{result.stdout}{result.stderr}")
        (file,) = made.iterdir()
        return Path(shutil.move(file, out / file.name))


def build_deb(out: Path, *, dependencies: bool = True) -> Path:
    """Raises CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="agentd-deb-") as folder:
        stage = Path(folder) / "stage"
        private = stage / PRIVATE
        wheel = build_wheel(Path(folder))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(private)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(private / "bin/python"), "install", "--no-compile"]
        pip += ["--constraint", str(ROOT / "constraints.txt")] if dependencies else ["--no-deps"]
        subprocess.run([*pip, "--quiet", f"{wheel}[mcp,otel]"], env={**os.environ, **without_amx()}, check=True)
        for note in private.glob("lib/*/site-packages/agentd-*.dist-info/direct_url.json"):
            note.unlink()  # where it was built is nobody's business
        _relocate(private, Path("/") / PRIVATE)
        _place_files(stage)
        size = sum(path.lstat().st_size for path in stage.rglob("*") if path.is_file()) // 1024
        _place_scripts(stage, size)
        for path in (stage, *stage.rglob("*")):  # readable to the service's user, whatever the umask was
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        file = out / f"agentd_{__version__}_{_architecture()}.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-Zzstd", "--build", str(stage), str(file)], check=True)
        return file


def _relocate(private: Path, target: Path) -> None:
    """An environment that was made in `private`, for `target`."""
    for script in (private / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        data = script.read_bytes()
        script.write_bytes(data.replace(os.fsencode(private), os.fsencode(target)))
    (private / "bin/python").unlink()
    (private / "bin/python").symlink_to(f"/usr/bin/python{_python()}")
    facts = ("home = /usr/bin", "include-system-site-packages = false", f"version = {_python()}")
    (private / "pyvenv.cfg").write_text("\n".join(facts) + "\n")


def _place_files(stage: Path) -> None:
    units = stage / "usr/lib/systemd/system"
    drop_in = units / "agentd.service.d/packaged.conf"
    drop_in.parent.mkdir(parents=True)
    for unit in (*UNITS, *OPTIONAL):
        shutil.copy(ROOT / "systemd" / unit, units / unit)
    start = f"/{PRIVATE}/bin/python -m agentd run --config /etc/agentd/agentd.yaml"
    drop_in.write_text(f"[Service]\nExecStart=\nExecStart={start}\n")
    for source, target in (
        ("systemd/agentd.sysusers", "usr/lib/sysusers.d/agentd.conf"),
        ("configs/agentd.yaml", "etc/agentd/agentd.yaml"),
        ("systemd/agentd.service.d/gpu.conf", "usr/share/doc/agentd/examples/gpu.conf"),
        ("systemd/agentd.service.d/newer.conf", "usr/share/doc/agentd/examples/newer.conf"),
        ("LICENSE", "usr/share/doc/agentd/copyright"),
    ):
        (stage / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, stage / target)
    (stage / "usr/bin").mkdir()
    for name in ("agentd", "agentctl"):
        (stage / "usr/bin" / name).symlink_to(f"/{PRIVATE}/bin/{name}")


def _place_scripts(stage: Path, kilobytes: int) -> None:
    control = stage / "DEBIAN"
    control.mkdir()
    facts = {"version": __version__, "architecture": _architecture(), "python": _python(), "kilobytes": kilobytes}
    (control / "control").write_text(CONTROL.format(**facts))
    (control / "conffiles").write_text("/etc/agentd/agentd.yaml\n")
    scripts = {
        "postinst": POSTINST,
        "prerm": PRERM.format(units=" ".join((*UNITS, *OPTIONAL))),
        "postrm": POSTRM.format(state=" ".join(STATE)),
    }
    for name, text in scripts.items():
        (control / name).write_text(text)
        (control / name).chmod(0o755)


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _architecture() -> str:
    command = ["dpkg", "--print-architecture"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
