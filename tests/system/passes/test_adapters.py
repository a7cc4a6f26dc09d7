"""LoRA, MeZO on LoRA, tensor trains and LoHo as passes of a real daemon: commit, proof, restart, other devices."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import gguf as gguf_files
import pytest
from safetensors.torch import load_file

from agentd.ctl.errors import ExitCode
from tests.support.tiny_passes import (
    SETTINGS,
    adapt,
    assert_made_again,
    assert_survives_a_kill,
    clean,
    committed,
    ctl,
    directory,
    gguf,
    manifest,
    roll,
    said,
    teach,
)
from tools.daemon import DaemonProcess

REFUSED = ExitCode.REFUSED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def learned(model: Path) -> Iterator[DaemonProcess]:
    """A daemon that has committed a pass of LoRA."""
    with committed(model, method="lora") as daemon:
        yield daemon


def assert_refused(daemon: DaemonProcess, archive: bytes, old: bytes, new: bytes, complaint: str) -> None:
    """An export in which something stands for something else is not taken in."""
    assert old in archive
    answer = daemon.post("/admin/import", archive.replace(old, new), admin=True)
    assert (answer.status, complaint in answer.error["message"]) == (400, True), answer.error


def test_a_revision_of_lora_is_its_factors(learned: DaemonProcess, capfd: pytest.CaptureFixture[str]) -> None:
    facts, folder = manifest(learned, 1), learned.state / "revisions" / "1"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "ledger", "lora.safetensors"}
    assert (facts["method"], facts["ranks"], facts["chain"]) == ("lora", [8], [0])
    assert {name.split(".")[-2] for name in load_file(folder / "lora.safetensors")} == {"lora_A", "lora_B"}
    row = learned.get("/admin/passes/1", admin=True).json
    before, after = (row["pass"]["gate"]["tasks"]["reviews"][side]["loss"] for side in ("before", "after"))
    assert after < before
    assert {step["phase"] for step in row["steps"]} == {"bp"}
    assert 0 < row["pass"]["peak_bytes"] <= row["pass"]["predicted_bytes"]
    assert "candidate weights" not in " ".join(row["pass"]["predicted"])
    assert ctl(learned, "replay", "1", "--verify", "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["verified"] is True
    assert answer["tensors_bytes"] == (folder / "lora.safetensors").stat().st_size


def test_it_survives_a_kill_and_is_gone_back_to_exactly(learned: DaemonProcess) -> None:
    assert_survives_a_kill(learned)


def test_it_moves_to_another_device_and_to_llama_cpp(learned: DaemonProcess, model: Path, tmp_path: Path) -> None:
    adapter, archive = tmp_path / "r.gguf", tmp_path / "r.agentd"
    assert ctl(learned, "export", "1", "--format", "gguf-lora", "-o", str(adapter)) == 0
    names = {tensor.name for tensor in gguf_files.GGUFReader(adapter).tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.3.ffn_down.weight.lora_b"} <= names
    assert ctl(learned, "export", "1", "-o", str(archive)) == 0
    with tarfile.open(archive) as opened:
        assert opened.getnames() == ["adaptation.json", "ledger", "lora.safetensors"]
    assert not list(learned.state.glob(".export-*"))
    serving = said(learned)
    with DaemonProcess(model, SETTINGS) as other:
        other.start()
        assert ctl(other, "import", str(archive)) == 0
        assert said(other) == serving
        assert manifest(other, 1)["weights_sha256"] == manifest(learned, 1)["weights_sha256"]
        assert ctl(other, "replay", "1", "--verify") == 0
        data = archive.read_bytes()
        for old, new, complaint in (
            (b"        8", b"        0", "no usable ranks"),
            (b'"ranks": [', b'"rankz": [', "neither steps nor low-rank adapters"),
            (b'"version": 1', b'"version": 2', "reads version 1"),
        ):
            assert_refused(other, data, old, new, complaint)


@pytest.mark.parametrize("method", ["mezo-lora", "adazeta", "loho"])
def test_the_others_commit_or_say_why_not(learned: DaemonProcess, method: str) -> None:
    roll(learned, 0) if learned.status()["revision"] else None
    teach(learned, 40)
    options = {"blocks": 1} if method == "loho" else {}
    row = adapt(learned, method=method, zo_steps=60, **options)
    assert row["method"] == method
    assert row["state"] in ("committed", "rejected"), row["reason"]
    assert row["gate"]["tasks"]["reviews"]["after"]["loss"] < row["gate"]["tasks"]["reviews"]["before"]["loss"]
    assert 0 < row["peak_bytes"] <= row["predicted_bytes"]
    if row["state"] == "committed":
        facts = manifest(learned, row["revision"])
        assert facts["zo_steps"] > 0
        assert ctl(learned, "replay", str(row["revision"]), "--verify") == 0
        assert_made_again(learned, row["revision"])


@pytest.fixture(scope="module")
def mixed(learned: DaemonProcess) -> int:
    """A revision whose line has all kinds: values by backpropagation, low-rank changes, steps, sparse ones, changes."""
    roll(learned, 0) if learned.status()["revision"] else None
    line = (
        {"method": "bp", "blocks": 1},
        {"method": "lora"},
        {"method": "mezo", "zo_steps": 12},
        {"method": "sparse-mezo", "zo_steps": 12},
        {"method": "lora"},
    )
    for options in line:
        teach(learned, 40)
        row = adapt(learned, **options)
        assert row["state"] == "committed", row["reason"]
    return int(row["revision"])


def test_a_line_of_all_kinds_moves_to_another_device(
    learned: DaemonProcess, mixed: int, model: Path, tmp_path: Path
) -> None:
    archive, again = tmp_path / "r.agentd", tmp_path / "again.agentd"
    assert ctl(learned, "export", str(mixed), "-o", str(archive)) == 0
    with tarfile.open(archive) as opened:
        assert opened.getnames() == ["adaptation.json", "ledger", "lora.safetensors", "tensors.safetensors"]
        described = json.load(opened.extractfile("adaptation.json"))  # type: ignore[arg-type]
    kinds = [(bool(each.get("ranks")), each.get("update", {}).get("sparsity")) for each in described["segments"]]
    assert kinds == [(True, None), (False, None), (False, 0.75), (True, None)]
    serving = said(learned)
    with DaemonProcess(model, SETTINGS) as other:
        other.start()
        assert ctl(other, "import", str(archive)) == 0
        assert said(other) == serving
        assert manifest(other, 1)["weights_sha256"] == manifest(learned, mixed)["weights_sha256"]
        clean(other)
        other.kill()
        other.start()
        assert said(other) == serving  # made again from what its one revision keeps
        assert ctl(other, "replay", "1", "--verify") == 0
        assert ctl(other, "export", "1", "-o", str(again)) == 0
        teach(other, 120)
        row = adapt(other, method="lora")  # on top of it
        assert row["state"] == "committed", row["reason"]
        assert ctl(other, "replay", str(row["revision"]), "--verify") == 0
        with tarfile.open(archive) as first, tarfile.open(again) as second:
            for name in ("ledger", "lora.safetensors", "tensors.safetensors"):
                assert first.extractfile(name).read() == second.extractfile(name).read()  # type: ignore[union-attr]
        data = archive.read_bytes()
        for old, new, complaint in (
            (b'"steps": ', b'"stepz": ', "neither steps nor low-rank adapters"),
            (b'"ranks": [', b'"rankz": [', "neither steps nor low-rank adapters"),
            (b'"segments": [', b'"segmentz": [', "its segments are no list"),
            (b'"tensors.safetensors": ', b'"tensorz.safetensors": ', "does not name the files"),
        ):
            assert_refused(other, data, old, new, complaint)


def test_such_a_line_is_no_adapter(
    learned: DaemonProcess, mixed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ctl(learned, "export", str(mixed), "--format", "gguf-lora", "-o", str(tmp_path / "x.gguf")) == REFUSED
    assert "adapters alone" in capfd.readouterr().err
    assert ctl(learned, "export", str(mixed), "--format", "safetensors", "-o", str(tmp_path / "w.safetensors")) == 0
    assert ctl(learned, "replay", str(mixed), "--verify") == 0


def test_a_directory_in_bfloat16_learns_as_well(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "dtype": "bfloat16"}}
    with DaemonProcess(directory(tmp_path, model), settings) as daemon:
        daemon.start()
        teach(daemon)
        row = adapt(daemon, method="lora")
        assert row["state"] == "committed", row["reason"]
        assert ctl(daemon, "replay", "1", "--verify") == 0
        assert ctl(daemon, "export", "1", "--format", "gguf-lora", "-o", str(tmp_path / "x.gguf")) == REFUSED
        assert "no GGUF file" in capfd.readouterr().err


def test_a_choice_that_makes_no_sense_is_refused(learned: DaemonProcess) -> None:
    for options, complaint in (
        ({"method": "lora", "blocks": 2}, "learns in all 4 blocks"),
        ({"method": "lora", "blocks": 0}, "use mezo-lora"),
        ({"method": "mezo-lora", "blocks": 2}, "use elasticzo"),
        ({"method": "loho", "blocks": 0}, "use mezo-lora or mezo"),
    ):
        refused = learned.post("/admin/adapt", {**options, "dry_run": True}, admin=True)
        assert refused.status == 409
        assert complaint in refused.error["message"]
