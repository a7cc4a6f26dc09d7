"""Preferences, thumbs and scores in real passes: whatever learns, what was found good is said more readily than what
was found bad, on examples that are held out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.adapt.passes.zeroth_order import EPSILON
from agentd.ctl.app import run
from tests.support.tiny_passes import LLAMACPP, SETTINGS, adapt, gguf, roll, teach
from tools.daemon import DaemonProcess

pytestmark = pytest.mark.slow

N = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("model"))


def judgements() -> list[dict[str, Any]]:
    """Answers of one letter are good, those of the other bad."""
    lines: list[dict[str, Any]] = []
    for i in range(N):
        good, bad = "aa" * (1 + i % 3), "zz" * (1 + i % 2)
        answer = bad if i % 2 else good
        lines += [
            {"task": "pairs", "text": f"Say it, {i}.", "chosen": good, "rejected": bad},
            {"task": "thumbs", "text": f"Tell me, {i}.", "completion": answer, "label": i % 2 == 0},
            {"task": "scores", "text": f"Go on, {i}.", "completion": answer, "score": 0.1 * (i % 3) - 3 * (i % 2)},
        ]
    return lines


def with_judgements(model: Path, settings: dict[str, Any]) -> Iterator[DaemonProcess]:
    with DaemonProcess(model, settings) as daemon:
        daemon.start()
        answer = daemon.post("/v1/examples", "\n".join(map(json.dumps, judgements())).encode())
        assert answer.status == 200, answer.body
        yield daemon


@pytest.fixture(scope="module")
def llamacpp(model: Path) -> Iterator[DaemonProcess]:
    yield from with_judgements(model, LLAMACPP)


@pytest.fixture(scope="module")
def transformers(model: Path) -> Iterator[DaemonProcess]:
    yield from with_judgements(model, SETTINGS)


def judged_by(daemon: DaemonProcess, **options: Any) -> dict[str, dict[str, Any]]:
    if daemon.status()["revision"]:
        roll(daemon, 0)
    row = adapt(daemon, **options)
    assert row["state"] == "committed", row["reason"]
    tasks: dict[str, dict[str, Any]] = row["gate"]["tasks"]
    assert set(tasks) == {"pairs", "thumbs", "scores"}
    assert tasks["pairs"]["after"]["accuracy"] >= tasks["pairs"]["before"]["accuracy"]
    assert tasks["thumbs"]["before"]["accuracy"] is tasks["scores"]["before"]["accuracy"] is None
    return tasks


@pytest.mark.parametrize("blocks", [1, 4])
def test_backpropagation_in_the_trainer(llamacpp: DaemonProcess, blocks: int) -> None:
    tasks = judged_by(llamacpp, blocks=blocks)
    assert all(facts["after"]["loss"] < facts["before"]["loss"] for facts in tasks.values())


def test_backpropagation_in_place(transformers: DaemonProcess) -> None:
    tasks = judged_by(transformers, method="bp")
    assert all(facts["after"]["loss"] < facts["before"]["loss"] for facts in tasks.values())


@pytest.mark.parametrize("daemon", ["llamacpp", "transformers"])
def test_forward_passes_alone(daemon: str, request: pytest.FixtureRequest) -> None:
    tasks = judged_by(request.getfixturevalue(daemon), method="mezo", zo_steps=60)
    before, after = (sum(facts[when]["loss"] for facts in tasks.values()) for when in ("before", "after"))
    assert after < before


def test_a_metric_is_learned_by_forward_passes_alone(model: Path) -> None:
    with DaemonProcess(model, LLAMACPP) as daemon:
        daemon.start()
        teach(daemon)
        texts = [{"task": "texts", "text": f"Say it, {i}.", "completion": "aa"} for i in range(N)]
        assert daemon.post("/v1/examples", "\n".join(map(json.dumps, texts)).encode()).status == 200
        row = adapt(daemon, objective="metric", zo_steps=60)
        assert (row["method"], row["options"]) == ("mezo", {"objective": "metric", "zo_steps": 60})
        steps = daemon.get(f"/admin/passes/{row['id']}", admin=True).json["steps"]
        assert steps[0]["epsilon"] > EPSILON  # where nothing flips, nothing could be learned
        assert all(0 <= step["loss"] <= 1 for step in steps)
        assert any(step["projected_gradient"] for step in steps)
        wrong = [step["dev_loss"] for step in steps if step["dev_loss"] is not None]
        assert min(wrong) < wrong[0]
        refused = adapt(daemon, objective="metric", method="suffix-bp")
        assert refused["state"] == "refused"
        assert "no derivative; use mezo, or objective likelihood" in refused["reason"]


def test_they_come_back_as_they_were_imported(llamacpp: DaemonProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["feedback", "export", "--examples", "--socket", str(llamacpp.admin)]) == 0
    exported = capsys.readouterr().out
    facts = ("chosen", "rejected", "completion", "label", "score")

    def known(line: dict[str, Any]) -> str:
        """What was judged, and how: as a text, or as a message of the assistant's."""
        values = [line.get(name) for name in facts]
        return str([value[0]["content"] if isinstance(value, list) else value for value in values])

    imported = [{**line, **({"score": float(line["score"])} if "score" in line else {})} for line in judgements()]
    assert sorted(known(json.loads(line)) for line in exported.splitlines()) == sorted(map(known, imported))
    again = llamacpp.post("/v1/examples", exported.encode())
    assert (again.status, again.json["unchanged"]) == (200, 3 * N)
