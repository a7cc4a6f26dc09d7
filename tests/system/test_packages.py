"""Packages hold what an installation needs, and leave what is the user's."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from agentd import __version__
from agentd.host.service import OPTIONAL, UNITS
from tools import package

pytestmark = pytest.mark.slow

DEPENDENCIES = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONSAFEPATH": "1"}
"""Of agentd, which need not be installed once more. What is tested is not the checkout: it is not on this path."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return package.build_wheel(built)


@pytest.fixture(scope="module")
def deb(built: Path) -> Path:
    if not shutil.which("dpkg-deb"):
        pytest.skip("there is no dpkg here")
    return package.build_deb(built, dependencies=False)


@pytest.fixture(scope="module")
def older(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a version before, with a module that has gone since and without the port's socket."""
    folder = tmp_path_factory.mktemp("older")
    run("dpkg-deb", "--raw-extract", deb, folder / "stage")
    control = folder / "stage/DEBIAN/control"
    control.write_text(control.read_text().replace(f"Version: {__version__}\n", "Version: 0.0.9\n"))
    (folder / "stage/opt/agentd/lib/gone.py").touch()
    (folder / "stage/usr/lib/systemd/system" / OPTIONAL[0]).unlink()
    run("dpkg-deb", "--root-owner-group", "--build", folder / "stage", folder / "older.deb")
    return folder / "older.deb"


def run(*command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=DEPENDENCIES, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_wheel_in_an_empty_environment_brings_units_and_configuration(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty")
    python = tmp_path / "empty/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    assert __version__ in run(tmp_path / "empty/bin/agentctl", "--version")
    place = run(python, "-c", "import agentd; print(agentd.__file__)")
    assert str(tmp_path) in place
    run(tmp_path / "empty/bin/agentd", "install-service", "--root", tmp_path / "board")
    installed = {path.name for path in (tmp_path / "board").rglob("*")}
    assert {*UNITS, *OPTIONAL, "agentd.yaml", "agentd.conf"} <= installed
    run(tmp_path / "empty/bin/agentd", "--config", tmp_path / "board/etc/agentd/agentd.yaml", "config")


def contents(wheel: Path) -> dict[str, int]:
    """Names and checksums of all that a wheel puts in place."""
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist() if not file.filename.endswith("/RECORD")}


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, built: Path, tmp_path: Path) -> None:
    sdist = package.build_sdist(built)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    run(*pip, "--wheel-dir", tmp_path, sdist)
    (again,) = tmp_path.glob("*.whl")
    assert contents(again) == contents(wheel)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"systemd/agentd.service", "configs/agentd.yaml", "agentd/py.typed", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests", "tools"))]


def test_remove_leaves_what_is_the_users_and_purge_takes_it(deb: Path, older: Path, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("dpkg wants root")
    root = tmp_path / "board"
    (root / "var/lib/dpkg").mkdir(parents=True)
    for name in ("status", "available"):
        (root / "var/lib/dpkg" / name).touch()
    dpkg = ("dpkg", "--root", root, "--force-script-chrootless", "--force-depends", "--log", tmp_path / "log")
    run(*dpkg, "--install", older)
    state, configuration = root / "var/lib/agentd/agentd.db", root / "etc/agentd/agentd.yaml"
    state.parent.mkdir(parents=True)
    state.write_text("what was learned")
    with configuration.open("a") as file:
        file.write("# the owner's own\n")
    run(*dpkg, "--install", deb)
    assert configuration.read_text().endswith("# the owner's own\n")
    assert state.read_text() == "what was learned"
    assert not (root / "opt/agentd/lib/gone.py").exists()
    for unit in (*UNITS, *OPTIONAL):
        assert (root / "usr/lib/systemd/system" / unit).is_file()
    drop_in = root / "usr/lib/systemd/system/agentd.service.d/packaged.conf"
    assert "ExecStart=/opt/agentd/bin/python -m agentd run --config /etc/agentd/agentd.yaml" in drop_in.read_text()
    assert (root / "usr/bin/agentctl").readlink() == Path("/opt/agentd/bin/agentctl")
    for script in (root / "opt/agentd/bin").iterdir():
        assert script.is_symlink() or str(package.ROOT.parent) not in script.read_text()
    assert (root / "opt/agentd/bin/agentd").read_text().startswith("#!/opt/agentd/bin/python")

    texts = {name: (root / f"var/lib/dpkg/info/agentd.{name}").read_text() for name in ("postinst", "prerm", "postrm")}
    for text in texts.values():
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    assert all(unit in texts["prerm"] for unit in (*UNITS, *OPTIONAL))  # are stopped and disabled
    run(*dpkg, "--install", deb)  # the same once more
    assert configuration.read_text().endswith("# the owner's own\n")
    compiled = root / "opt/agentd/lib/__pycache__"
    compiled.mkdir()
    (compiled / "of-a-start.pyc").touch()
    run(*dpkg, "--remove", "agentd")
    assert not (root / "opt/agentd").exists()
    assert state.exists()
    assert configuration.exists()
    run(*dpkg, "--purge", "agentd")
    assert not state.parent.exists()
    assert not configuration.parent.exists()
