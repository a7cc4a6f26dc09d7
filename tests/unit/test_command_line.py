import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agentd import __main__ as command_line
from agentd import __version__
from agentd.config import schema


def agentd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agentd", *arguments]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("AGENTD_")}
    return subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_version() -> None:
    for arguments in (("version",), ("--version",)):
        assert agentd(*arguments).stdout == f"agentd {__version__}\n"


def test_help_names_every_command() -> None:
    output = agentd("--help").stdout
    for command in ("run", "config", "fetch-model", "fit", "version", "--config"):
        assert command in output


def test_config_prints_what_is_in_effect(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {context: 512}")
    for arguments in (("--config", str(path), "config"), ("config", "--config", str(path))):
        tree = yaml.safe_load(agentd(*arguments, AGENTD_ADAPT_RANK="4").stdout)
        assert (tree["model"]["context"], tree["adapt"]["rank"]) == (512, 4)
    assert yaml.safe_load(agentd("config", AGENTD_CONFIG=str(path)).stdout)["model"]["context"] == 512


def test_config_reference_lists_every_key() -> None:
    output = agentd("config", "--reference").stdout
    assert [line.split()[0] for line in output.splitlines()] == [name for name, _, _ in schema.reference()]


def test_mistakes_in_the_settings_end_every_command_with_78(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("model: {context: 1}\ncolour: red")
    for command in ("run", "config", "fetch-model"):
        result = agentd("--config", str(path), command)
        assert result.returncode == 78
        assert result.stdout == ""
        assert f"2 problem(s) in {path}" in result.stderr
        assert "model.context: should be greater than or equal to 256, not 1" in result.stderr
        assert "Traceback" not in result.stderr
    assert agentd("--config", str(path)).returncode == 78  # without a command: run


def test_fetch_model_checks_the_configured_file(tmp_path: Path, real_model: Path) -> None:
    result = agentd("fetch-model", AGENTD_MODEL_PATH=str(real_model))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{real_model}\n")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(real_model.read_bytes()[:1_000_000])
    result = agentd("fetch-model", AGENTD_MODEL_PATH=str(damaged))
    assert result.returncode == 66
    assert result.stderr.startswith(f"agentd: cannot use the model {damaged}: it is cut short")


def test_the_daemon_side_does_not_load_the_heavy_libraries() -> None:
    program = "import sys, agentd.__main__, agentd.models; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "agentd" in loaded
    assert not loaded & {"torch", "numpy", "llama_cpp", "transformers", "huggingface_hub", "gguf"}


def test_root_does_not_restore_into_its_own_state_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside an installed service it has to say which state it means."""
    service = tmp_path / "service"
    service.mkdir()
    own = tmp_path / "own"
    monkeypatch.setattr(command_line, "_SERVICE_STATE", service)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "umask", lambda _: 0o077)
    for name in ("AGENTD_STATE_DIR", "AGENTD_CONFIG", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(own))
    assert command_line.main(["restore", str(tmp_path / "backup.tar")]) == 65
    said = capsys.readouterr().err
    assert str(service) in said
    assert str(own) in said
    assert not own.exists()
