import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import setup

VERSIONS = ["3.10", "3.11", "3.12", "3.13"]


def pins(version: str) -> list[Requirement]:
    """The packages that constraints.txt names for a Python version."""
    lines = (line.split("#")[0].strip() for line in setup.CONSTRAINTS.read_text().splitlines())
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    pinned = [Requirement(line) for line in lines if line]
    return [pin for pin in pinned if pin.marker is None or pin.marker.evaluate(environment)]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_package_is_pinned_once(version: str) -> None:
    names = [canonicalize_name(pin.name) for pin in pins(version)]
    assert len(set(names)) == len(names)
    assert all(str(pin.specifier).startswith("==") for pin in pins(version))
    assert {"torch", "llama-cpp-python", "transformers", "starlette", "numpy", "pytest", "setuptools"} <= set(names)


def test_everything_agentd_needs_is_pinned() -> None:
    """Walks the installed packages from agentd's own requirements, as pip would."""
    pinned = {canonicalize_name(pin.name) for version in VERSIONS for pin in pins(version)}
    waiting, seen = [("agentd", "dev")], set()
    while waiting:
        name, extra = waiting.pop()
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            assert needed in pinned, f"{needed} (needed by {name}) is missing in constraints.txt"
            for item in [(needed, extra_name) for extra_name in requirement.extras or {""}]:
                if item not in seen:
                    seen.add(item)
                    waiting.append(item)
    assert len(seen) > 50


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pins_satisfy_the_declared_bounds(version: str) -> None:
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins(version)}
    for text in metadata.requires("agentd") or []:
        requirement = Requirement(text)
        marker = str(requirement.marker or "")
        if "python_version" in marker and not requirement.marker.evaluate({"python_version": version, "extra": "dev"}):  # type: ignore[union-attr]
            continue
        (pin,) = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.version), f"{requirement} and {pin.version}"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("CMake Error: CMAKE_CXX_COMPILER not set, after EnableLanguage", "build-essential"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("OSError: [Errno 28] No space left on device", "TMPDIR"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("ERROR: No matching distribution found for torch==2.13.0", "network"),
        ("something nobody has seen before", ""),
    ],
)
def test_a_failure_says_what_to_do(line: str, hint: str) -> None:
    advice = setup.hints(f"2026-01-01T00:00:00,000 line\n{line}\nline")
    assert hint in advice
    assert bool(advice) == bool(hint)


def test_a_failed_installation_ends_with_its_log_and_advice(tmp_path: Path) -> None:
    """In an environment of its own, whose pip finds no index."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    library = next((tmp_path / "lib").glob("python*")) / "site-packages"
    (library / "here.pth").write_text(os.pathsep.join(path for path in sys.path if path.endswith("site-packages")))
    (library / "llama_cpp.py").touch()  # no compiler is asked for
    result = subprocess.run(
        [tmp_path / "bin/python", setup.__file__],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FORCE_REINSTALL": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "1/4 pip" in result.stdout
    assert str(tmp_path / "setup.log") in result.stderr
    assert "Check the network" in result.stderr


def test_missing_compilers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.missing_compilers() == ["CC (cc or gcc or clang)", "CXX (c++ or g++ or clang++)"]
    (tmp_path / "gcc").touch(mode=0o755)
    assert setup.missing_compilers() == ["CXX (c++ or g++ or clang++)"]
    monkeypatch.setenv("CXX", "special-c++ -m64")
    assert setup.missing_compilers() == ["CXX (special-c++)"]


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no compiler")
def test_processors_with_amx_get_a_build_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O3")
    monkeypatch.delenv("CC", raising=False)
    cpu = tmp_path / "cpuinfo"
    assert setup.without_amx(cpu) == {}
    cpu.write_text("flags : fpu avx512_bf16\n")
    assert setup.without_amx(cpu) == {}
    cpu.write_text("flags : fpu amx_bf16 amx_tile\n")
    flags = setup.without_amx(cpu)
    assert flags == {} or flags["CXXFLAGS"] == f"-O3 {flags['CFLAGS']}"  # a compiler may know no AMX
