import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import setup

VERSIONS = [(3, 10), (3, 11), (3, 12), (3, 13)]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_package_is_pinned_at_most_once(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    pins = setup.small_requirements()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    names = [pin.split("==")[0] for pin in pins]
    assert len(set(names)) == len(names)
    assert not {"torch", "llama-cpp-python"} & set(names)
    assert {"transformers", "starlette", "numpy", "pytest", "mypy", "setuptools"} <= set(names)


def test_everything_agentd_needs_is_pinned() -> None:
    """Walks the installed packages from agentd's own requirements, as pip would."""
    pins = {Requirement(line).name for line in setup.requirements()}
    waiting, seen = [("agentd", "dev")], set()
    while waiting:
        name, extra = waiting.pop()
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            assert needed in pins, f"{needed} (needed by {name}) is missing in constraints.txt"
            for item in [(needed, wanted) for wanted in requirement.extras or {""}]:
                if item not in seen:
                    seen.add(item)
                    waiting.append(item)
    assert len(seen) > 50


def test_the_pins_satisfy_the_declared_bounds() -> None:
    pins: dict[str, list[str]] = {}
    for line in setup.requirements():
        requirement = Requirement(line)
        pins.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier).removeprefix("=="))
    for text in metadata.requires("agentd") or []:
        requirement = Requirement(text)
        for version in pins[canonicalize_name(requirement.name)]:
            assert requirement.specifier.contains(version), f"{requirement} and {version}"


def test_compilation_is_shown_by_tenths_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = setup.Progress("llama.cpp")
    for step in range(1, 141):
        setup._show(progress, f"  [{step}/140] Building CXX object ggml.o", None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  llama.cpp: compiling"
    assert [line.split()[2] for line in lines[1:]] == [str(10 * tenth) for tenth in range(1, 11)]


def test_a_download_is_shown_by_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    progress = setup.Progress("torch")
    setup._show(progress, "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (190 MB)", None)
    setup._show(progress, "Progress 500 of 1000", None)
    assert "torch: fetching torch 50 %" in capsys.readouterr().out
    setup._show(progress, "Progress 900 of 0", None)
    assert progress.fraction == 0.5


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("CMake Error: CMAKE_CXX_COMPILER not set, after EnableLanguage", "build-essential"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("OSError: [Errno 28] No space left on device", "TMPDIR"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("ERROR: No matching distribution found for torch==2.13.0", "network"),
    ],
)
def test_a_failure_says_what_to_do(line: str, hint: str) -> None:
    message = setup._explain([*(f"line {number}" for number in range(30)), line])
    assert hint in message
    assert line in message
    assert "line 29" in message
    assert "line 3\n" not in message


def test_a_failed_build_is_shown_from_its_first_error() -> None:
    lines = [f"-- step {number}" for number in range(50)]
    lines += ["CMake Error at CMakeLists.txt:3 (project):", "  No such thing", *(f"detail {n}" for n in range(30))]
    lines += ["  error: subprocess-exited-with-error", "note: likely not a problem with pip"]
    message = setup._explain(lines)
    assert message.splitlines()[1].strip() == "CMake Error at CMakeLists.txt:3 (project):"
    assert "detail 12" in message
    assert "likely not a problem" not in message


def test_missing_compilers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.missing_compilers() == ["C compiler", "C++ compiler"]
    (tmp_path / "gcc").touch(mode=0o755)
    assert setup.missing_compilers() == ["C++ compiler"]
    monkeypatch.setenv("CXX", "special-c++ -m64")
    assert setup.missing_compilers() == ["C++ compiler (CXX=special-c++)"]
