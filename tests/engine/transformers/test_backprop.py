"""Backpropagation in the last blocks of the weights that serve: exact, and never seen by serving."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentd.engine.protocol import BASE, LearningRule
from agentd.engine.transformers import background as backgrounds
from agentd.engine.transformers.background import TransformersBackground
from agentd.engine.transformers.engine import TransformersEngine
from agentd.engine.transformers.image import digest
from agentd.errors import InvalidRequest, RevisionCorrupt
from agentd.learn import descent, ledger
from agentd.learn.encoded import Encoded
from agentd.learn.ledger import Step
from tests.support.engine_samples import ask, chat, last
from tools import tiny_model

SETTINGS = [(1, 1e-3), (2, 1e-3), (1, 0.0), (tiny_model.N_BLOCKS, 0.0)]  # blocks, epsilon


def learn(
    background: TransformersBackground, examples: list[Encoded], blocks: int, epsilon: float, n: int = 3
) -> list[Step]:
    """Some steps of ElasticZO, or of backpropagation alone; returns those in the trunk."""
    background.rule(LearningRule(blocks=blocks))
    steps = []
    for seed in range(n):
        plus, minus = last(background.descend(examples, 0.1, seed, epsilon, 3e-3))
        if epsilon:
            steps.append(Step(seed, (plus - minus) / (2 * epsilon), 1e-5, epsilon))
            background.update(seed, steps[-1].coefficient)
    return steps


def keep(background: TransformersBackground, folder: Path, steps: list[Step], parent: int = 0) -> Path:
    """What the session has learned as a revision's files; the ledger's path."""
    folder.mkdir(parents=True, exist_ok=True)
    background.write_moved(folder / "tensors.safetensors")
    facts = {"tensors": len(load_file(folder / "tensors.safetensors")), "weights_sha256": background.digest()}
    (folder / "manifest.json").write_text(json.dumps(facts))
    ledger.write(folder / "ledger", ledger.Ledger(parent, steps))
    return folder / "ledger"


def parameters(background: TransformersBackground) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in background._current.tensors.items()}


def test_a_step_goes_down_the_gradient_of_the_last_blocks_alone(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    if engine.model.dtype != torch.float32:
        pytest.skip("a difference of losses this small is below bfloat16's rounding")
    background.rule(LearningRule(blocks=2))
    before, lr = parameters(background), 1e-5
    loss, same = last(background.descend(examples, 0.1, 1, 0.0, lr))
    assert loss == same == pytest.approx(last(background.loss(examples, 0.1, 0, 0.0)), rel=0.01)
    after = parameters(background)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("model.layers.2.", "model.layers.3.", "model.norm.")) for name in moved)
    # theta moved by -lr gradient, so the loss falls by lr |gradient|^2 = |moved|^2 / lr.
    expected = sum(float((after[name] - before[name]).square().sum()) for name in moved) / lr
    assert loss - last(background.loss(examples, 0.1, 0, 0.0)) == pytest.approx(expected, rel=0.05)


def test_the_minus_pass_s_loss_and_gradient_are_those_of_the_perturbed_trunk(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    background.rule(LearningRule(blocks=1))
    both = last(background.pair(examples, 0.1, 7, 1e-2))
    assert last(background.descend(examples, 0.1, 7, 1e-2, 3e-3)) == pytest.approx(both, rel=1e-3)
    assert both[0] != both[1]


def test_the_minus_pass_s_gradient_is_that_at_the_perturbed_trunk(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    """What moves the last blocks is BP through the minus pass: as from weights that really stand at theta - eps z."""
    if engine.model.dtype != torch.float32:
        pytest.skip("updates of bfloat16 weights are rounded by chance")
    epsilon, lr = 0.03, 1e-4

    def moved(trunk: float, at: float) -> dict[str, torch.Tensor]:
        background.rule(LearningRule(blocks=1))
        before = parameters(background)
        if trunk:
            background.update(7, trunk)
        last(background.descend(examples, 0.1, 7, at, lr))
        changes = {name: after - before[name] for name, after in parameters(background).items()}
        return {name: change for name, change in changes.items() if name.startswith(("model.layers.3.", "model.norm."))}

    elastic, by_hand, at_theta = moved(0.0, epsilon), moved(-epsilon, 0.0), moved(0.0, 0.0)
    assert elastic.keys() == by_hand.keys() != set()

    def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return math.sqrt(math.fsum(float((one[name] - other[name]).square().sum()) for name in one))

    assert apart(elastic, by_hand) < 0.02 * apart(elastic, at_theta)


class SessionOracle:
    """The session as `learn.descent` wants it, on one mini-batch."""

    def __init__(self, background: TransformersBackground, examples: list[Encoded]) -> None:
        self.background, self.examples = background, examples

    def loss(self, seed: int, scale: float, batch: int) -> float:
        value: float = last(self.background.loss(self.examples, 0.1, seed, scale))
        return value

    def update(self, seed: int, coefficient: float) -> None:
        self.background.update(seed, coefficient)

    def descend(self, seed: int, epsilon: float, lr: float, batch: int) -> tuple[float, float]:
        plus, minus = last(self.background.descend(self.examples, 0.1, seed, epsilon, lr))
        return plus, minus


@pytest.mark.parametrize(
    ("rule", "epsilon", "period"),
    [
        (LearningRule(blocks=1), None, 1),
        (LearningRule(blocks=1), 1e-3, 1),
        (LearningRule(blocks=1, everywhere=True), 1e-3, 4),
    ],
    ids=["bp", "elasticzo", "loho"],
)
def test_what_a_pass_runs_lowers_the_loss(
    background: TransformersBackground, examples: list[Encoded], rule: LearningRule, epsilon: float | None, period: int
) -> None:
    background.rule(rule)
    oracle = SessionOracle(background, examples)
    before = oracle.loss(0, 0.0, 0)
    for _ in descent.minimise(oracle, steps=16, lr=1e-2, epsilon=epsilon, period=period, probes=2):
        pass
    assert oracle.loss(0, 0.0, 0) < 0.95 * before


@pytest.mark.parametrize(("blocks", "epsilon"), SETTINGS)
def test_staging_makes_the_same_bytes_from_the_ledger_and_the_tensors(
    engine: TransformersEngine,
    background: TransformersBackground,
    examples: list[Encoded],
    tmp_path: Path,
    blocks: int,
    epsilon: float,
) -> None:
    steps = learn(background, examples, blocks, epsilon)
    path, scores = keep(background, tmp_path / "r", steps), last(background.score(examples))
    stored = load_file(tmp_path / "r" / "tensors.safetensors")
    assert ("model.embed_tokens.weight" in stored) == (blocks == tiny_model.N_BLOCKS)
    engine.stage("candidate", path, None)
    background.use("candidate")
    assert last(background.score(examples)) == scores
    assert background.digest() != digest(engine.model.base.mapped)
    background.use(BASE)
    assert last(background.score(examples)) != scores


def test_methods_may_follow_one_another(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded], tmp_path: Path
) -> None:
    """Every revision is its parent and what is its own: MeZO, ElasticZO on it, MeZO on that, BP on that."""
    revisions = engine.lineage._revisions
    assert revisions is not None
    mezo = [Step(50, 1.0, 1e-4, 1e-3)]
    for number, (blocks, epsilon) in enumerate([(0, 1e-3), (2, 1e-3), (0, 1e-3), (1, 0.0)], 1):
        folder = revisions / str(number)
        if blocks:
            background.use(str(number - 1))
            steps = learn(background, examples, blocks, epsilon)
            keep(background, folder, steps, number - 1)
        else:
            folder.mkdir(parents=True)
            ledger.write(folder / "ledger", ledger.Ledger(number - 1, mezo))
        engine.stage(str(number), folder / "ledger", None)
    expected = digest(engine._registry["4"].mapped)
    for image in engine.lineage._folder.glob("weights-*"):
        image.unlink()
    engine.stage("4", revisions / "4" / "ledger", None)
    assert digest(engine._registry["4"].mapped) == expected
    *_, replayed = iterate(engine.replaying(revisions / "4" / "ledger"))
    assert replayed == expected


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_frozen_trunk_is_run_once_for_an_example(
    engine: TransformersEngine,
    background: TransformersBackground,
    examples: list[Encoded],
    blocks: int,
    monkeypatch: Any,
) -> None:
    """In any company: the states of a mini-batch are put together from those of its examples."""
    batches = [examples[:3], examples[3:], examples[1:5], examples[::-1], examples[:3]]
    runs: list[int] = []
    last(background.loss(examples, 0.1, 0, 0.0))  # masks are tried out
    handle = engine.model.blocks[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    background.rule(LearningRule(blocks=blocks))

    def learned() -> tuple[list[float], list[float], int]:
        background.use(BASE)
        runs.clear()
        losses = [last(background.descend(batch, 0.1, i, 0.0, 1e-3))[0] for i, batch in enumerate(batches)]
        judged = [last(background.loss(batch, 0.1, 0, 0.0)) for batch in batches]
        return losses, judged, len(runs)

    try:
        losses, judged, few = learned()
        monkeypatch.setattr(background, "_cache_trunk", lambda: None)
        plain, plain_judged, many = learned()
    finally:
        handle.remove()
    exact = engine.model.dtype == torch.float32
    assert losses == pytest.approx(plain, rel=1e-4 if exact else 0.03)
    assert judged == pytest.approx(plain_judged, rel=1e-4 if exact else 0.03)
    assert (few, many) == (2, 2 * len(batches))
    assert all("forward" not in vars(block) for block in engine.model.blocks)


def test_a_trunk_that_moves_is_run_again(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    background.rule(LearningRule(blocks=1))
    before = last(background.descend(examples, 0.1, 1, 0.0, 1e-9))[0]
    cached = background._trunk
    background.update(7, 3e-2)
    moved = last(background.descend(examples, 0.1, 2, 0.0, 1e-9))[0]
    assert moved != pytest.approx(before, rel=1e-3)
    assert moved == pytest.approx(last(background.loss(examples, 0.1, 0, 0.0)), rel=0.02)
    assert cached is not None
    assert background._trunk is not cached
    background.use(BASE)
    assert last(background.descend(examples, 0.1, 1, 0.0, 1e-9))[0] == before


def iterate(steps: Any) -> Iterator[Any]:
    yield (yield from steps)


def test_a_revision_without_its_tensors_is_refused(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded], tmp_path: Path
) -> None:
    path = keep(background, tmp_path / "r", learn(background, examples, 1, 1e-3))
    file = tmp_path / "r" / "tensors.safetensors"
    good = file.read_bytes()
    other = bytearray(good)
    other[-3] ^= 1
    for data, complaint in ((good[:-8], "cut short"), (b"", "no safetensors"), (bytes(other), "gives weights")):
        file.write_bytes(data)
        with pytest.raises(RevisionCorrupt, match=complaint):
            engine.stage("1", path, None)
    file.unlink()
    with pytest.raises(RevisionCorrupt):
        engine.stage("1", path, None)
    file.write_bytes(good)
    facts = json.loads((tmp_path / "r" / "manifest.json").read_text())
    foreign = {**load_file(file), "model.nonesuch": torch.zeros(2)}
    changes: list[tuple[int, dict[str, torch.Tensor]]] = [
        (facts["tensors"] + 1, load_file(file)),
        (len(foreign), foreign),
    ]
    for number, tensors in changes:
        (tmp_path / "r" / "manifest.json").write_text(json.dumps({**facts, "tensors": number}))
        save_file(tensors, file)
        with pytest.raises(RevisionCorrupt, match="does not hold"):
            engine.stage("1", path, None)
    assert engine.stats()["staged"] == [BASE]
    assert not list(engine.lineage._folder.glob(".*.tmp"))


def test_serving_sees_the_committed_weights_between_the_parts_of_a_step(
    engine: TransformersEngine,
    background: TransformersBackground,
    examples: list[Encoded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backgrounds, "LOSS_TOKENS", 192)
    request = chat("q", "What now?", logprobs=0, max_tokens=4)
    clean = ask(engine, request)[0].logprobs
    background.rule(LearningRule(blocks=2))
    alone = last(background.descend(examples, 0.1, 3, 1e-3, 3e-3)), background.digest()
    background.use(BASE)
    losses = []
    for pair in background.descend(examples, 0.1, 3, 1e-3, 3e-3):
        assert ask(engine, request)[0].logprobs == clean
        losses.append(pair)
    assert len(losses) > 4
    assert (losses[-1], background.digest()) == alone


def test_a_loss_that_is_no_number_moves_nothing(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    background.rule(LearningRule(blocks=1))
    last(background.descend(examples, 0.1, 1, 1e-3, 1e38))  # beyond all numbers
    before = background.digest()
    losses = last(background.descend(examples, 0.1, 2, 1e-3, 1e-3))
    assert not all(map(math.isfinite, losses))
    assert background.digest() == before


def test_what_cannot_be_learned_is_refused(
    background: TransformersBackground, examples: list[Encoded], tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="blocks"):
        background.rule(LearningRule(blocks=tiny_model.N_BLOCKS + 1))
    background.rule(LearningRule(blocks=0))
    with pytest.raises(InvalidRequest, match="no blocks learn"):
        last(background.descend(examples, 0.1, 1, 1e-3, 1e-3))
    with pytest.raises(InvalidRequest, match="nothing to write"):
        background.write_moved(tmp_path / "t")
