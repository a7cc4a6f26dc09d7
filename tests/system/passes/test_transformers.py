"""The weights of engine transformers learn in a real daemon: commit, restart, rollback, proof, and another device."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from agentd import models
from agentd.errors import ModelUnusable
from agentd.learn import ledger
from agentd.methods import OF_ENGINE
from tests.support.tiny_passes import (
    SETTINGS,
    Learner,
    adapt,
    clean,
    committed,
    ctl,
    directory,
    finished,
    gguf,
    manifest,
    roll,
    said,
    teach,
)
from tools.daemon import DaemonProcess, eventually


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def learned(model: Path) -> Iterator[DaemonProcess]:
    """A daemon that has committed a pass, on top of which every test builds."""
    with committed(model) as daemon:
        yield daemon


def weights(daemon: DaemonProcess) -> Path:
    return daemon.state / "weights"


def test_a_revision_is_a_manifest_and_a_ledger(learned: DaemonProcess) -> None:
    folder = learned.state / "revisions" / "1"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "ledger"}
    facts = manifest(learned, 1)
    steps = ledger.read(folder / "ledger")
    assert steps.parent == 0
    assert len(steps.steps) == facts["zo_steps"] > 0
    assert (folder / "ledger").stat().st_size == 32 + 20 * len(steps.steps)
    assert (facts["dtype"], facts["update"]) == ("float32", {"distribution": "rademacher", "sparsity": None})
    image = load_file(weights(learned) / f"weights-{facts['weights_sha256']}.safetensors")
    digest = hashlib.sha256()
    for name in image_order(weights(learned) / f"weights-{facts['weights_sha256']}.safetensors"):
        digest.update(image[name].numpy().tobytes())
    assert digest.hexdigest() == facts["weights_sha256"]
    row = learned.get("/admin/passes/1", admin=True).json
    before, after = (row["pass"]["gate"]["tasks"]["reviews"][side]["loss"] for side in ("before", "after"))
    assert after < before
    assert {step["phase"] for step in row["steps"]} == {"zo"}


def image_order(path: Path) -> list[str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return [name for name in json.loads(file.read(length)) if name != "__metadata__"]


def test_rollback_and_forward_give_the_same_bytes(learned: DaemonProcess) -> None:
    new = said(learned)
    roll(learned, 0)
    old = said(learned)
    assert old != new
    clean(learned)
    roll(learned, 1)
    assert said(learned) == new
    roll(learned, 0)
    assert said(learned) == old
    roll(learned, 1)


@pytest.mark.parametrize("damage", ["no image", "a damaged image"])
def test_what_serves_survives_a_kill(learned: DaemonProcess, damage: str) -> None:
    before = said(learned)
    learned.kill()
    (image,) = weights(learned).glob(f"weights-{json.loads(revision_file(learned))['weights_sha256']}*")
    if damage == "no image":
        image.unlink()
    else:
        data = bytearray(image.read_bytes())
        data[-5] ^= 64
        image.write_bytes(data)
    learned.start()
    assert learned.status()["revision"] == 1
    assert said(learned) == before


def revision_file(daemon: DaemonProcess) -> str:
    return (daemon.state / "revisions" / "1" / "manifest.json").read_text()


def test_replay_proves_a_revision_and_exposes_another_ledger(
    learned: DaemonProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ctl(learned, "replay", "1", "--verify", "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["verified"] is True
    assert answer["replayed_sha256"] == manifest(learned, 1)["weights_sha256"]
    assert answer["steps"] == manifest(learned, 1)["zo_steps"]
    assert ctl(learned, "replay", "1", "--json") == 0
    assert "verified" not in json.loads(capfd.readouterr().out)
    assert ctl(learned, "replay", "0", "--verify") == 5
    assert ctl(learned, "replay", "99", "--verify") == 4
    assert "Traceback" not in learned.log
    path = learned.state / "revisions" / "1" / "ledger"
    data = path.read_bytes()
    steps = ledger.decode(data).steps
    first = ledger.Step(steps[0].seed + 1, steps[0].projected_gradient, steps[0].lr, steps[0].epsilon)
    try:
        path.write_bytes(ledger.encode(ledger.Ledger(0, [first, *steps[1:]])))
        capfd.readouterr()
        assert ctl(learned, "replay", "1", "--verify") == 1
        assert "sha256 differs" in capfd.readouterr().err
    finally:
        path.write_bytes(data)


def test_an_adaptation_moves_to_another_device_in_kilobytes(
    learned: DaemonProcess, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "moved.agentd"
    assert ctl(learned, "export", "1", "--output", str(path)) == 0
    assert path.stat().st_size < 16_000
    assert ctl(learned, "export", "1", "--output", str(path)) == 2  # nothing is overwritten
    with DaemonProcess(model, SETTINGS) as other:
        other.start()
        base = said(other)
        assert ctl(other, "import", str(path)) == 0
        assert other.status()["revision"] == 1
        assert said(other) == said(learned) != base
        facts = manifest(other, 1)
        assert facts["weights_sha256"] == manifest(learned, 1)["weights_sha256"]
        assert facts["imported"] == {"origin": 1}
        assert "no holdout" in other.get("/admin/passes/1", admin=True).json["pass"]["gate"]["reason"]
        assert ctl(other, "replay", "1", "--verify") == 0
        # Where there is holdout, the gate judges it: the same again is no improvement.
        teach(other)
        assert ctl(other, "import", str(path)) == 6
        assert "no task improved" in other.get("/admin/passes/2", admin=True).json["pass"]["reason"]
        # What is learned on top has the imported revision for its parent, and goes on from its weights.
        row = adapt(other, zo_steps=100)
        if row["state"] == "committed":
            assert manifest(other, row["revision"])["parent"] == 1
            assert ctl(other, "replay", str(row["revision"]), "--verify") == 0
            again = tmp_path / "line.agentd"
            assert ctl(other, "export", str(row["revision"]), "-o", str(again)) == 0
            with tarfile.open(again) as archive:
                member = archive.extractfile("ledger")
                assert member is not None
                steps = ledger.decode(member.read())
            assert len(steps.steps) == facts["zo_steps"] + manifest(other, row["revision"])["zo_steps"]
    capfd.readouterr()


def test_what_does_not_fit_is_refused(learned: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "good.agentd"
    assert ctl(learned, "export", "1", "-o", str(path)) == 0
    good = path.read_bytes()

    def post(data: bytes) -> tuple[int, str]:
        answer = learned.post("/admin/import", data, admin=True)
        return answer.status, "" if answer.status == 202 else answer.error["message"]

    def changed(**facts: Any) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(good)) as old, tarfile.open(fileobj=out, mode="w") as new:
            for member in old.getmembers():
                file = old.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name == "adaptation.json":
                    data = json.dumps({**json.loads(data), **facts}).encode()
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
        return out.getvalue()

    for data, status, complaint in (
        (b"", 400, "no exported adaptation"),
        (b"hello" * 200, 400, "no exported adaptation"),
        (good[:700], 400, ""),
        (good.replace(b"AGENTDZO", b"AGENTDXX"), 400, "its ledger is not what was written"),
        (changed(format="other"), 400, "agentd-adaptation"),
        (changed(version=9), 400, "version 9"),
        (changed(engine="onnx"), 400, "of an engine 'onnx'"),
        (changed(engine="llamacpp"), 400, "adapter.gguf or control.gguf"),
        (changed(files={}), 400, "does not name the files"),
        (changed(segments=[]), 400, "do not have the"),
        (changed(origin=-1), 400, "no usable origin"),
        (changed(update={"distribution": "cauchy", "sparsity": None}), 400, "cauchy"),
        (changed(update={"distribution": "rademacher", "sparsity": 2}), 400, "sparsity"),
        (changed(weights_sha256="x"), 400, "weights_sha256"),
        (changed(base_sha256="0" * 64), 409, "base with sha256 000"),
        (changed(dtype="bfloat16"), 409, "model.dtype: bfloat16"),
    ):
        code, message = post(data)
        assert (code, complaint in message) == (status, True), (message, complaint)
    # A base that is called the same and leads elsewhere: the weights tell.
    answer = learned.post("/admin/import", changed(weights_sha256="0" * 64), admin=True)
    assert answer.status == 202
    row = finished(learned, answer.json["pass"])
    assert row["state"] == "failed"
    assert "replaying its ledger gives weights" in row["reason"]
    assert learned.status()["revision"] == 1


def test_weights_are_exported_as_transformers_reads_them(learned: DaemonProcess, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    assert ctl(learned, "export", "1", "--format", "safetensors", "-o", str(path)) == 0
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(str(model.parent), gguf_file=model.name, dtype="float32")
    base = {name: parameter.detach().clone() for name, parameter in original.named_parameters()}
    tensors = load_file(path)
    assert set(tensors) == set(base)
    assert all((tensors[name] - base[name]).abs().max() > 0 for name in base)  # all of them learned
    assert ctl(learned, "export", "1", "--format", "gguf-lora") == 5
    assert ctl(learned, "export", "0") == 5
    assert ctl(learned, "export", "1", "--format", "onnx") == 2


def test_requests_are_answered_by_the_committed_weights_while_others_learn(learned: DaemonProcess) -> None:
    before = said(learned)
    number = learned.post("/admin/adapt", {"zo_steps": 5000}, admin=True).json["pass"]

    def step() -> int:
        return int(learned.get("/admin/progress", admin=True).json["pass"]["step"])

    eventually(lambda: step() > 5, 30)
    for _ in range(5):
        first = step()
        assert said(learned) == before
        eventually(lambda first=first: step() > first, 30)  # type: ignore[misc]
    assert learned.post("/admin/cancel", {}, admin=True).status == 200
    assert finished(learned, number)["state"] == "failed"
    assert said(learned) == before


def test_no_pass_starts_before_the_engine_has(model: Path) -> None:
    with DaemonProcess(model, SETTINGS) as daemon:
        daemon.start(wait=False)

        def listens() -> bool:
            with contextlib.suppress(OSError):
                return bool(daemon.status())
            return False

        eventually(listens, 30)
        assert daemon.status()["state"] == "loading"
        answer = daemon.post("/admin/adapt", {"method": "lora"}, admin=True)
        assert (answer.status, answer.json["error"]["code"]) == (503, "engine_unavailable")
        assert "try again" in answer.json["error"]["message"]
        daemon.wait_until_ready()
        assert daemon.get("/admin/passes", admin=True).json["passes"] == []


def test_an_engine_that_dies_in_a_pass_fails_it_and_serves_the_committed_weights(learned: DaemonProcess) -> None:
    before = said(learned)
    number = learned.post("/admin/adapt", {"zo_steps": 5000}, admin=True).json["pass"]
    eventually(lambda: learned.get("/admin/progress", admin=True).json["pass"]["step"] > 2, 30)
    (engine,) = [
        child.pid
        for child in psutil.Process(learned.pid).children()
        if "agentd.engine.process.runner" in child.cmdline()
    ]
    os.kill(engine, signal.SIGKILL)
    assert finished(learned, number)["state"] == "failed"
    eventually(lambda: learned.get("/health").status == 200, 30)
    assert said(learned) == before


def test_sparse_mezo_is_a_method_too(learned: DaemonProcess) -> None:
    roll(learned, 0)
    row = adapt(learned, method="sparse-mezo", zo_steps=60)
    assert row["method"] == "sparse-mezo"
    assert row["state"] in ("committed", "rejected"), row["reason"]
    if row["state"] == "committed":
        assert manifest(learned, row["revision"])["update"]["sparsity"] == 0.75
        assert ctl(learned, "replay", str(row["revision"]), "--verify") == 0
    if learned.status()["revision"] != 1:
        roll(learned, 1)


def test_the_budget_has_the_plans_of_this_engine(learned: DaemonProcess) -> None:
    answer = learned.get("/admin/budget", admin=True).json
    plans = {(plan["method"], plan["blocks"]): plan for plan in answer["plans"]}
    assert {method for method, _ in plans} == set(OF_ENGINE["transformers"])
    terms = {term["name"]: term["bytes"] for term in plans["mezo", 0]["terms"]}
    assert terms["candidate weights"] == answer["model"]["weight_bytes"]
    assert terms["candidate weights"] == pytest.approx(learned.status()["model"]["size_bytes"], rel=1e-3)
    for options, complaint in (({"method": "suffix-bp"}, "has no method"), ({"blocks": 2}, "use elasticzo")):
        refused = learned.post("/admin/adapt", {**options, "dry_run": True}, admin=True)
        assert refused.status == 409
        assert complaint in refused.error["message"]
    small = learned.get("/admin/passes/1", admin=True).json["pass"]
    assert 0 < small["peak_bytes"] <= small["predicted_bytes"]


def test_a_directory_in_bfloat16_learns_as_well(model: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "dtype": "bfloat16"}}
    with DaemonProcess(directory(tmp_path, model), settings) as daemon:
        daemon.start()
        assert daemon.status()["model"]["name"] == "tiny"
        teach(daemon)
        row = adapt(daemon, zo_steps=100)
        assert row["state"] in ("committed", "rejected"), row["reason"]
        assert row["gate"]["drift"] < 1
        if row["state"] == "committed":
            assert manifest(daemon, 1)["dtype"] == "bfloat16"
            assert ctl(daemon, "replay", "1", "--verify") == 0


@pytest.mark.parametrize(("method", "most"), [("mezo", 0.006), ("lora", 0.04)])  # a third of what they drift by
def test_what_drifts_too_far_gives_up_no_more_than_it_has_to(model: Path, method: str, most: float) -> None:
    """Steps are made smaller, or adapters; what is judged is what is served, and made again."""
    gate = {**SETTINGS["adapt"]["gate"], "max_drift": most}
    with Learner(model, {**SETTINGS, "adapt": {**SETTINGS["adapt"], "gate": gate}}).start() as daemon:
        teach(daemon)
        row = adapt(daemon, method=method)
        events = daemon.get(f"/admin/passes/{row['id']}", admin=True).json["events"]
        assert [event for event in events if event["kind"] == "shortened"]
        assert 0.6 * most < row["gate"]["drift"] <= most
        assert row["state"] == "committed", row["reason"]
        assert ctl(daemon, "replay", "1", "--verify") == 0


IN_A_DAEMON = ("no weights", "unknown", "another shape")


@pytest.fixture(scope="module")
def whole_directory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("directory"), model)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("no config", "there is no config.json"),
        ("no weights", "no safetensors files"),
        ("cut", "cut short"),
        ("no tokenizer", "no tokenizer"),
        ("an encoder", "no causal language model, but BertModel"),
        ("unknown", "transformers cannot load it"),
        ("a shard missing", "model-2.safetensors is missing"),
        ("another shape", "transformers cannot load it"),
    ],
)
def test_a_directory_that_cannot_be_served_is_named(
    whole_directory: Path, tmp_path: Path, damage: str, complaint: str
) -> None:
    folder = Path(shutil.copytree(whole_directory, tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "cut":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
    elif damage == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
            (folder / name).unlink(missing_ok=True)
    elif damage == "a shard missing":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        change = {"an encoder": {"architectures": ["BertModel"]}, "unknown": {"model_type": "nonesuch"}}
        config |= change.get(damage, {"hidden_size": 96, "head_dim": 24})
        (folder / "config.json").write_text(json.dumps(config))
    if damage not in IN_A_DAEMON:  # which asks the same before it starts anything
        with pytest.raises(ModelUnusable, match=complaint):
            models.check(folder, "transformers")
        return
    with DaemonProcess(folder, SETTINGS) as daemon:
        status, log = daemon.run_to_end()
    assert status == ModelUnusable.exit_status == 66, log
    assert complaint in log
