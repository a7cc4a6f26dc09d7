"""`agentd install-service` into another root, and away again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agentd.errors import ServiceNotInstalled
from agentd.host import service

UNITS = Path(__file__).parents[3] / "systemd"


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def installed(root: Path, *options: str) -> str:
    command = [sys.executable, "-m", "agentd", "install-service", "--root", str(root), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_model_that_the_service_cannot_read_is_noted(tmp_path: Path) -> None:
    assert "note: the service has no network: fetch the model (default)" in installed(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir()
    model = closed / "m.gguf"
    model.touch()
    (tmp_path / "etc/agentd/agentd.yaml").write_text(f"model: {{path: {model}}}\n")
    for place in (tmp_path, *(each for each in tmp_path.parents if "pytest-of-" in str(each))):
        place.chmod(0o755)
    link = tmp_path / "m.gguf"
    link.symlink_to(model)
    closed.chmod(0o700)
    for named in (model, link):
        (tmp_path / "etc/agentd/agentd.yaml").write_text(f"model: {{path: {named}}}\n")
        noted = installed(tmp_path)
        assert f"note: the service's user may not enter {closed}, where the model is: chmod o+x it" in noted
    (tmp_path / "etc/agentd/agentd.yaml").write_text(f"model: {{path: {model}}}\n")
    closed.chmod(0o755)
    model.chmod(0o600)
    assert f"note: the service's user may not read {model}" in installed(tmp_path)
    model.chmod(0o644)
    assert "note: the" not in installed(tmp_path)
    model.unlink()
    assert f"note: the model {model}: No such file" in installed(tmp_path)


def test_everything_is_put_in_place_and_taken_away(tmp_path: Path) -> None:
    output = installed(tmp_path, "--gpu")
    expected = {f"etc/systemd/system/{unit}" for unit in (*service.UNITS, *service.OPTIONAL)}
    expected |= {f"etc/systemd/system/agentd.service.d/{name}.conf" for name in ("installed", "gpu")}
    expected |= {"etc/sysusers.d/agentd.conf", "etc/agentd/agentd.yaml"}
    assert files(tmp_path) - {"etc/systemd/system/agentd.service.d/newer.conf"} == expected
    assert all(str(tmp_path / name) in output for name in expected)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in expected} == {0o644}
    own = (tmp_path / "etc/systemd/system/agentd.service.d/installed.conf").read_text()
    assert f"ExecStart=\nExecStart={sys.executable} -m agentd run --config /etc/agentd/agentd.yaml\n" in own

    output = installed(tmp_path, "--uninstall")
    assert files(tmp_path) == {"etc/agentd/agentd.yaml"}
    assert "kept" in output
    assert not (tmp_path / "etc/systemd/system/agentd.service.d").exists()
    installed(tmp_path, "--uninstall")  # nothing there is no fault


def test_a_configuration_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "etc/agentd/agentd.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("serve: {slots: 2}\n")
    service.install(tmp_path, gpu=True)
    assert path.read_text() == "serve: {slots: 2}\n"
    service.install(tmp_path)
    assert "etc/systemd/system/agentd.service.d/gpu.conf" not in files(tmp_path)


def test_where_nothing_may_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file")
    with pytest.raises(ServiceNotInstalled, match="Not a directory"):
        service.install(tmp_path)


def analyze(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(
        ["systemd-analyze", f"--root={root}", "--man=no", "--no-pager", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_finds_no_fault_in_what_is_installed(tmp_path: Path, gpu: bool) -> None:
    service.install(tmp_path, gpu=gpu)
    for program in ("usr/bin/env", "bin/kill", str(Path(sys.executable)).lstrip("/")):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).touch(mode=0o755)
    result = analyze(tmp_path, "verify", *service.UNITS, *service.OPTIONAL)
    # There is nothing else in this root: that other units are missing is not the point.
    faults = [line for line in result.stderr.splitlines() if "agentd" in line and "not found" not in line]
    assert faults == []
    result = analyze(tmp_path, "security", "--offline=yes", "--threshold=10", "agentd.service")
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze has no --offline")
    assert result.returncode == 0, result.stdout[-300:] + result.stderr
    assert "SAFE" in result.stdout


def test_the_drop_in_for_newer_systemd_holds_only_what_is_newer() -> None:
    lines = (UNITS / "agentd.service.d" / "newer.conf").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line and not line.startswith("#")}
    newer = {"MemoryPressureWatch", "MemoryPressureThresholdSec", "FileDescriptorStorePreserve"}
    assert names == {*newer, "FileDescriptorStoreMax"}
