"""ElasticZO and backpropagation on the weights of engine transformers, in a real daemon: what a revision is made of."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from agentd.learn import ledger
from tests.support.tiny_passes import (
    SETTINGS,
    adapt,
    assert_made_again,
    clean,
    committed,
    ctl,
    gguf,
    manifest,
    said,
    teach,
)
from tools.daemon import DaemonProcess

LAST_TWO = ("model.layers.2.", "model.layers.3.", "model.norm.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def learned(model: Path) -> Iterator[DaemonProcess]:
    """A daemon that has committed a pass of ElasticZO."""
    with committed(model, method="elasticzo", blocks=2, zo_steps=40) as daemon:
        yield daemon


def test_a_revision_of_elasticzo_is_its_steps_and_the_last_blocks(learned: DaemonProcess) -> None:
    facts, folder = manifest(learned, 1), learned.state / "revisions" / "1"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "ledger", "tensors.safetensors"}
    assert (facts["method"], facts["blocks"], facts["chain"]) == ("elasticzo", 2, [0])
    stored = load_file(folder / "tensors.safetensors")
    assert len(stored) == facts["tensors"] > 0
    assert all(name.startswith(LAST_TWO) for name in stored)
    assert set(facts["files"]) == {"ledger", "tensors.safetensors"}
    assert facts["zo_steps"] == len(ledger.read(folder / "ledger").steps) > 0
    row = learned.get("/admin/passes/1", admin=True).json["pass"]
    before, after = (row["gate"]["tasks"]["reviews"][side]["loss"] for side in ("before", "after"))
    assert after < before
    assert 0 < row["peak_bytes"] <= row["predicted_bytes"]
    assert not list(folder.parent.glob(".*"))


def test_it_is_gone_back_to_exactly(learned: DaemonProcess) -> None:
    assert_made_again(learned, 1)


def test_replay_proves_it(learned: DaemonProcess, capfd: pytest.CaptureFixture[str]) -> None:
    assert ctl(learned, "replay", "1", "--verify", "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["verified"] is True
    assert answer["tensors_bytes"] == (learned.state / "revisions" / "1" / "tensors.safetensors").stat().st_size
    path = learned.state / "revisions" / "1" / "tensors.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert ctl(learned, "replay", "1", "--verify") == 1
        assert "sha256 differs" in capfd.readouterr().err
    finally:
        path.write_bytes(data)


def test_methods_follow_one_another_and_move_to_another_device(
    learned: DaemonProcess, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """MeZO on ElasticZO's weights, then BP on MeZO's; the whole line is one file."""
    line = [1]
    for options in ({"method": "mezo", "zo_steps": 40}, {"method": "bp", "blocks": 1}, {"method": "bp", "blocks": 4}):
        row = adapt(learned, **options)
        assert row["state"] in ("committed", "rejected"), row["reason"]
        if row["state"] == "committed":
            number = row["revision"]
            facts = manifest(learned, number)
            assert facts["chain"] == [0, *line]
            assert (facts["method"], bool(facts["tensors"])) == (options["method"], options["method"] == "bp")
            line.append(number)
        else:
            teach(learned, 40)
    assert len(line) > 1, "nothing was committed on top of the first revision"
    serving = said(learned)
    clean(learned)
    learned.kill()
    learned.start()
    assert said(learned) == serving
    last = str(line[-1])
    assert ctl(learned, "replay", last, "--verify") == 0
    path = tmp_path / "line.agentd"
    assert ctl(learned, "export", last, "-o", str(path)) == 0
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["adaptation.json", "ledger", "tensors.safetensors"]
    assert not list(learned.state.glob(".export-*"))
    whole = tmp_path / "whole.safetensors"
    assert ctl(learned, "export", last, "--format", "safetensors", "-o", str(whole)) == 0
    assert set(load_file(whole)) > set(load_file(learned.state / "revisions" / "1" / "tensors.safetensors"))
    with DaemonProcess(model, SETTINGS) as other:
        other.start()
        assert ctl(other, "import", str(path)) == 0
        assert said(other) == serving
        assert manifest(other, 1)["weights_sha256"] == manifest(learned, line[-1])["weights_sha256"]
        assert ctl(other, "replay", "1", "--verify") == 0
        capfd.readouterr()
        data = path.read_bytes()
        for bad, complaint in ((data.replace(b'"data_offsets":[0', b'"data_offsetz":[0'), "sha256 differs"),):
            answer = other.post("/admin/import", bad, admin=True)
            assert (answer.status, complaint in answer.error["message"]) == (400, True), answer.error


def test_a_choice_of_blocks_that_makes_no_sense_is_refused(learned: DaemonProcess) -> None:
    for options, complaint in (
        ({"method": "elasticzo", "blocks": 4}, "leaves no trunk"),
        ({"method": "bp", "blocks": 0}, "would train nothing"),
        ({"method": "mezo", "blocks": 2}, "use elasticzo"),
        ({"method": "bp", "blocks": 5}, "the model has 4"),
        ({"method": "suffix-bp"}, "has no method"),
    ):
        refused = learned.post("/admin/adapt", {**options, "dry_run": True}, admin=True)
        assert refused.status == 409
        assert complaint in refused.error["message"]


def test_the_planner_weighs_them_against_mezo(learned: DaemonProcess) -> None:
    answer = learned.get("/admin/budget", admin=True).json
    plans = {(plan["method"], plan["blocks"]): plan for plan in answer["plans"]}
    assert set(plans) == {
        *((method, 0) for method in ("mezo", "sparse-mezo", "mezo-lora", "adazeta")),
        *((method, k) for method in ("elasticzo", "loho") for k in (1, 2)),
        *(("bp", 1), ("bp", 2), ("bp", 4), ("lora", 4)),
    }
    terms = {name: {term["name"]: term["bytes"] for term in plan["terms"]} for name, plan in plans.items()}
    weights = answer["model"]["weight_bytes"]
    assert terms["elasticzo", 1]["candidate weights"] == terms["bp", 4]["candidate weights"] == weights
    assert terms["bp", 4]["gradients"] == weights
    assert terms["bp", 1]["candidate weights"] == terms["bp", 1]["gradients"] < weights / 3
    sizes = [plans["bp", k]["needed_bytes"] for k in (1, 2, 4)]
    assert sizes == sorted(sizes)
    assert plans["elasticzo", 2]["needed_bytes"] > plans["mezo", 0]["needed_bytes"]
    dry = learned.post("/admin/adapt", {"method": "bp", "blocks": 2, "dry_run": True}, admin=True).json["plan"]
    assert (dry["method"], dry["blocks"], dry["zo_steps"]) == ("bp", 2, 0)
    dry = learned.post("/admin/adapt", {"method": "auto", "dry_run": True}, admin=True).json["plan"]
    assert dry["blocks"] > 0  # there is memory, and backpropagation brings more
