"""Revisions of engine llama.cpp on another device: adapter and control vector in one file, judged there by the gate."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from agentd.ctl.errors import ExitCode
from tests.support.tiny_passes import adapt, ctl, manifest, said, teach
from tools import tiny_model
from tools.daemon import DaemonProcess

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "model": {"threads": 1, "context": 512},
    "adapt": {
        "enabled": False,
        "trial": {"duration": "300ms", "max_latency": 100},
        "gate": {"alpha": 0.4, "min_holdout": 5, "max_drift": 100, "max_skill_loss": 1},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def learned(model: Path) -> Iterator[DaemonProcess]:
    """A daemon that has committed a pass with steps of both kinds, whose revision has both files."""
    with DaemonProcess(model, SETTINGS) as daemon:
        daemon.start()
        teach(daemon)
        row = adapt(daemon, method="elasticzo", blocks=2, zo_steps=24)
        assert row["state"] == "committed", row["reason"]
        assert set(manifest(daemon, 1)["files"]) == {"adapter.gguf", "control.gguf", "ledger"}
        yield daemon


def test_a_bundle_is_all_that_was_learned(learned: DaemonProcess, model: Path, tmp_path: Path) -> None:
    path, again = tmp_path / "r.agentd", tmp_path / "again.agentd"
    assert ctl(learned, "export", "1", "-o", str(path)) == 0
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["adaptation.json", "adapter.gguf", "control.gguf"]
    with DaemonProcess(model, SETTINGS) as other:
        other.start()
        base = said(other)
        assert ctl(other, "import", str(path)) == 0
        assert said(other) == said(learned) != base
        facts = manifest(other, 1)
        assert (facts["method"], facts["blocks"], facts["parent"]) == ("elasticzo", 2, 0)
        assert facts["imported"] == {"origin": 1}
        assert "no holdout" in other.get("/admin/passes/1", admin=True).json["pass"]["gate"]["reason"]
        # What a device has taken in it can hand on, and where there is holdout the same again is no improvement.
        assert ctl(other, "export", "1", "-o", str(again)) == 0
        assert again.read_bytes() == path.read_bytes()
        teach(other)
        assert ctl(other, "import", str(path)) == ExitCode.NOT_COMMITTED
        other.kill()
        other.start()
        assert said(other) == said(learned)


def test_a_bundle_for_another_base_or_engine_is_refused_with_what_to_do(
    learned: DaemonProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.agentd"
    assert ctl(learned, "export", "1", "-o", str(path)) == 0
    another = tiny_model.write(tmp_path / "another.gguf", seed=7)
    with DaemonProcess(another, SETTINGS) as other:
        other.start()
        assert ctl(other, "import", str(path)) == ExitCode.REFUSED
        assert "name that base in model.path" in capfd.readouterr().err
    answer = learned.post("/admin/import", path.read_bytes().replace(b"GGUF", b"GGUG"), admin=True)
    assert (answer.status, "sha256 differs" in answer.error["message"]) == (400, True)
    assert learned.status()["revision"] == 1


def test_an_adapter_comes_with_its_control_vector(
    learned: DaemonProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, control = tmp_path / "r.gguf", tmp_path / "r.control.gguf"
    assert ctl(learned, "export", "1", "--format", "gguf-lora", "-o", str(adapter), "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert (printed["path"], printed["control"]["path"]) == (str(adapter), str(control))
    assert control.read_bytes() == (learned.state / "revisions" / "1" / "control.gguf").read_bytes()
    assert {tensor.name.partition(".")[0] for tensor in gguf.GGUFReader(control).tensors} == {"direction"}
    assert ctl(learned, "export", "1", "--format", "safetensors", "-o", str(tmp_path / "x")) == ExitCode.REFUSED
    assert "bundle or gguf-lora or gguf-control" in capfd.readouterr().err
