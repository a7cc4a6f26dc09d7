"""A pass's work on a classifier: learning that helps, a ledger that replays, errors that say what is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentd.engine.int8.background import ClassifierSession
from agentd.engine.int8.engine import Int8Engine
from agentd.engine.operations import Encode, Learn, LearnReport, ScoreExamples, SignStepReport, Use
from agentd.errors import InvalidRequest, RevisionCorrupt
from agentd.int8 import sign_ledger
from agentd.int8.weights import load_int8
from agentd.learn.encoded import Encoded
from tests.support.int8_samples import array, classifier, images, write_examples

N = 200
RECIPE: dict[str, Any] = {"steps": 120, "batch": 32, "seed": 5, "noise": (15, 128), "bp_bits": (3, 2, 1)}


def result(steps: Iterator[Any]) -> Any:
    return progress_of(steps)[1]


def progress_of(steps: Iterator[Any]) -> tuple[list[Any], Any]:
    """What a command yields, and what it returns."""
    progress = []
    while True:
        try:
            progress.append(next(steps))
        except StopIteration as stop:
            return progress, stop.value


@pytest.fixture
def engine() -> Int8Engine:
    return Int8Engine(classifier())


@pytest.fixture
def session(engine: Int8Engine, tmp_path: Path) -> ClassifierSession:
    """Turned bars: 200 examples, of which tests learn from 120, select by 30 and judge by 50."""
    session = engine.session(lambda: False, lambda: False)
    source = write_examples(tmp_path / "examples.jsonl", *images(N, 11, turned=True))
    assert result(session.begin(Encode(source, tmp_path / "classes.jsonl"))) == N
    assert result(session.begin(Use("0"))) is None
    return session


def learn(session: ClassifierSession, folder: Path, **changed: Any) -> tuple[list[SignStepReport], LearnReport]:
    arguments: dict[str, Any] = {
        "parent": 0,
        "bp_layers": 2,
        "frozen": False,
        "zo_bits": (0, -1, -2),
        **RECIPE,
        **changed,
    }
    arguments |= {"network": folder / "new", "ledger": folder / "ledger"}
    return progress_of(session.begin(Learn(list(range(120)), list(range(120, 150)), **arguments)))


def accuracy(session: ClassifierSession, folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "classes.jsonl").read_text().splitlines()]
    scores = result(session.begin(ScoreExamples(list(range(150, N)))))
    hits: list[bool] = [
        max(range(4), key=s.choices.__getitem__) == line["correct"] for s, line in zip(scores, lines[150:], strict=True)
    ]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("bp_layers", "frozen"), [(1, False), (2, False), (2, True), (3, False)])
def test_a_turned_camera_is_learned(
    engine: Int8Engine, session: ClassifierSession, tmp_path: Path, bp_layers: int, frozen: bool
) -> None:
    before = accuracy(session, tmp_path)
    assert before < 0.6
    _, done = learn(session, tmp_path, bp_layers=bp_layers, frozen=frozen)
    assert done.dev_loss_after is not None
    assert done.dev_loss_before is not None
    assert done.dev_loss_after < done.dev_loss_before
    assert accuracy(session, tmp_path) == before  # what serves has not moved
    engine.stage("candidate", tmp_path / "new", None)
    result(session.begin(Use("candidate")))
    assert accuracy(session, tmp_path) > before + 0.2
    base, new = load_int8(classifier()), load_int8(tmp_path / "new")
    cutoff = base.architecture.cutoff(bp_layers)
    moved = [
        not torch.equal(base.parameters[p.index].mantissa, new.parameters[p.index].mantissa)
        for p in base.described
        if p.layer < cutoff
    ]
    assert any(moved) == (cutoff > 0 and not frozen)
    assert (tmp_path / "ledger").exists() == (cutoff > 0 and not frozen)


@pytest.mark.parametrize("bp_layers", [0, 1, 2])
def test_the_ledger_replays_to_the_same_bytes(session: ClassifierSession, tmp_path: Path, bp_layers: int) -> None:
    _, done = learn(session, tmp_path, bp_layers=bp_layers, zo_bits=(2, 1), parent=7)
    signs = sign_ledger.decode((tmp_path / "ledger").read_bytes())
    assert (signs.parent, signs.bp_layers, len(signs.steps)) == (7, bp_layers, done.best_step)
    assert 0 < len(signs.steps) == done.zo_steps
    assert {step.sign for step in signs.steps} >= {-1, 1}
    replayed, new = load_int8(classifier()), load_int8(tmp_path / "new")
    sign_ledger.replay(signs, replayed)
    cutoff = new.architecture.cutoff(bp_layers)
    trunk = [p.index for p in new.described if p.layer < cutoff]
    assert trunk
    for index in trunk:
        assert replayed.parameters[index].mantissa.numpy().tobytes() == new.parameters[index].mantissa.numpy().tobytes()


def test_the_same_seed_learns_the_same_and_another_does_not(session: ClassifierSession, tmp_path: Path) -> None:
    learned = []
    for seed in (5, 5, 6):
        learn(session, tmp_path, seed=seed, steps=20)
        learned.append((tmp_path / "new").read_bytes())
    assert learned[0] == learned[1] != learned[2]


def test_every_step_is_reported_and_the_best_is_kept(session: ClassifierSession, tmp_path: Path) -> None:
    steps, done = learn(session, tmp_path, bp_layers=3, bp_bits=(6,), steps=60)
    assert [report.step for report in steps] == list(range(1, 61))
    judged = {report.step: report.dev_loss for report in steps if report.dev_loss is not None}
    assert len(judged) == 10
    assert done.dev_loss_before is not None
    assert done.dev_loss_after == min(*judged.values(), done.dev_loss_before)
    assert judged.get(done.best_step, done.dev_loss_before) == done.dev_loss_after


def test_a_run_that_only_does_harm_ends_where_it_began(session: ClassifierSession, tmp_path: Path) -> None:
    flipped = write_examples(tmp_path / "flipped.jsonl", *images(N, 12))
    lines = [json.loads(line) for line in flipped.read_text().splitlines()]
    order = ["top", "upper", "lower", "bottom"]
    for line in lines[:120]:  # wrong labels to learn from, right ones to judge by
        line["target"] = order[(order.index(line["target"]) + 1) % 4]
    flipped.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result(session.begin(Encode(flipped, tmp_path / "classes.jsonl")))
    _, done = learn(session, tmp_path, bp_layers=3, bp_bits=(4,))
    assert done.best_step == done.zo_steps == 0
    base, new = load_int8(classifier()), load_int8(tmp_path / "new")
    assert all(torch.equal(a.mantissa, b.mantissa) for a, b in zip(base.parameters, new.parameters, strict=True))


def test_examples_that_cannot_be_used_say_why(engine: Int8Engine, tmp_path: Path) -> None:
    good = array(images(1, 1)[0][0])
    lines = [
        {"input": good, "choices": [], "target": "top"},
        {"input": good, "choices": [], "target": "sideways"},
        {"input": {"messages": []}, "choices": [], "target": "top"},
        {"input": array(torch.zeros(1, 5, 5)), "choices": [], "target": "top"},
    ]
    source, target = tmp_path / "examples.jsonl", tmp_path / "classes.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    session = engine.session(lambda: False, lambda: False)
    result(session.begin(Encode(source, target)))
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert Encoded.from_json(written[0]) == Encoded.of([], [], 0, [])
    assert "none of the model's classes" in written[1]["error"]
    assert "array or a PNG" in written[2]["error"]
    assert "shape" in written[3]["error"]
    with pytest.raises(InvalidRequest, match="no example 1"):
        result(session.begin(ScoreExamples([0, 1])))
    with pytest.raises(InvalidRequest, match="no example 9"):
        result(session.begin(ScoreExamples([9])))
    with pytest.raises(RevisionCorrupt, match="not staged"):
        result(session.begin(Use("8")))
