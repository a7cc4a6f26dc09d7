"""Low-rank changes beside the weights that serve: never seen by serving, merged exactly, exported for stock tools."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.protocol import BASE, AdapterSpec, LearningRule
from agentd.engine.transformers.background import TransformersBackground
from agentd.engine.transformers.engine import TransformersEngine
from agentd.engine.transformers.image import digest
from agentd.errors import Conflict, InvalidRequest, RevisionCorrupt
from agentd.learn import ledger
from agentd.learn.encoded import Encoded
from agentd.learn.ledger import Step
from tests.support.engine_samples import ask, chat, last

LORA = AdapterSpec("lora", 4, 8.0, 1, differentiated=True)
ZO_LORA = AdapterSpec("lora", 4, 8.0, 1)
TRAIN = AdapterSpec("tensor-train", 3, 1.0, 1)


def learn(background: TransformersBackground, examples: list[Encoded], change: AdapterSpec, n: int = 4) -> float:
    """Some steps, by what the change learns with; returns the loss at their end."""
    background.rule(LearningRule(adapters=change))
    for seed in range(n):
        if change.differentiated:
            last(background.descend(examples, 0.1, seed, 0.0, 3e-3))
        else:
            plus, minus = last(background.pair(examples, 0.1, seed, 1e-2))
            background.update(seed, -1e-3 * (plus - minus) / 2e-2)
    loss: float = last(background.loss(examples, 0.1, 0, 0.0))
    return loss


def keep(background: TransformersBackground, folder: Path, change: AdapterSpec, parent: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    background.write_moved(folder / "lora.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"ranks": [change.rank]}))
    ledger.write(folder / "ledger", ledger.Ledger(parent, []))
    return folder / "ledger"


@pytest.mark.parametrize("change", [LORA, ZO_LORA, TRAIN], ids=["lora", "mezo-lora", "adazeta"])
def test_what_is_merged_is_what_was_learned(
    engine: TransformersEngine,
    background: TransformersBackground,
    examples: list[Encoded],
    tmp_path: Path,
    change: AdapterSpec,
) -> None:
    before = last(background.loss(examples, 0.1, 0, 0.0))
    base = digest(engine.model.base.mapped)
    learned = learn(background, examples, change)
    assert learned < before
    assert background.digest() == base  # the weights stay as they are
    path = keep(background, tmp_path / "r", change)
    engine.stage("candidate", path, None)
    background.use("candidate")
    exact = engine.model.dtype == torch.float32
    assert last(background.loss(examples, 0.1, 0, 0.0)) == pytest.approx(learned, rel=1e-4 if exact else 0.03)
    first = background.digest()
    assert first != base
    for image in engine.lineage._folder.glob("weights-*"):
        image.unlink()
    engine.stage("candidate", path, None)
    background.use("candidate")
    assert background.digest() == first
    background.use(BASE)
    assert last(background.loss(examples, 0.1, 0, 0.0)) == before


@pytest.mark.parametrize("change", [LORA, ZO_LORA], ids=["lora", "mezo-lora"])
def test_serving_sees_the_committed_weights_in_the_middle_of_a_step(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded], change: AdapterSpec
) -> None:
    request = chat("q", "What now?", logprobs=0, max_tokens=4)
    clean = ask(engine, request)[0].logprobs
    learn(background, examples, change)
    steps = (
        background.descend(examples, 0.1, 9, 0.0, 1e-2)
        if change.differentiated
        else background.pair(examples, 0.1, 9, 1e-2)
    )
    seen = 0
    for _ in steps:
        assert ask(engine, request)[0].logprobs == clean
        seen += 1
    assert seen > 1
    assert ask(engine, request)[0].logprobs == clean
    assert all("forward" not in vars(module) for module in engine.model.module.modules())


def test_a_line_of_changes_is_one_adapter_for_llama_cpp(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded], tmp_path: Path
) -> None:
    """Two revisions, one on the other: as a GGUF adapter on the GGUF that they were learned on they say the same."""
    if engine.model.dtype != torch.float32:
        pytest.skip("one type is enough: what is written does not depend on it")
    revisions = engine.lineage._revisions
    assert revisions is not None
    for number in (1, 2):
        background.use(str(number - 1))
        learn(background, examples, LORA, 6)
        engine.stage(str(number), keep(background, revisions / str(number), LORA, number - 1), None)
    background.use("2")
    expected = choices(background, examples)
    background.use(BASE)
    before = choices(background, examples)
    collecting = engine.collecting(revisions / "2" / "ledger", tmp_path / "two.gguf", "gguf")
    assert finished(collecting) == [4, 4]
    other = LlamaCppEngine(engine._path, context=512, slots=1)
    try:
        other.stage("candidate", tmp_path / "two.gguf", None)
        session = other.background(lambda: False)
        plain = choices(session, examples)
        session.use("candidate")
        adapted = choices(session, examples)
        session.close()
    finally:
        other.close()
    effect = max(abs(new - old) for new, old in zip(expected, before, strict=True))
    assert effect > 1
    assert before == pytest.approx(plain, abs=0.02 * effect)
    assert expected == pytest.approx(adapted, abs=0.02 * effect)
    # and as safetensors, taken in as one revision: the same bytes
    assert finished(engine.collecting(revisions / "2" / "ledger", tmp_path / "lora.safetensors", "safetensors"))
    (tmp_path / "manifest.json").write_text(json.dumps({"ranks": [4, 4]}))
    ledger.write(tmp_path / "ledger", ledger.Ledger(0, []))
    engine.stage("candidate", tmp_path / "ledger", None)
    assert digest(engine._registry["candidate"].mapped) == digest(engine._registry["2"].mapped)


def choices(session: Any, examples: list[Encoded]) -> list[float]:
    """The log-likelihoods of all choices of all examples."""
    return [value for some in session.score(examples) for score in some for value in score.choices]


def finished(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def test_files_that_do_not_fit_are_refused(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded], tmp_path: Path
) -> None:
    learn(background, examples, LORA, 1)
    path = keep(background, tmp_path / "r", LORA)
    file = tmp_path / "r" / "lora.safetensors"
    good = load_file(file)
    name = next(name for name in good if name.endswith("lora_A.weight"))
    for change, complaint in (
        ({name: good[name][:2].contiguous()}, "do not fit one another"),
        ({name: good[name][:, :3].contiguous()}, "do not fit a weight"),
        ({f"base_model.model.nonesuch.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}, "this model has not"),
        ({name: torch.full_like(good[name], math.nan)}, "not finite"),
        ({"something": torch.zeros(1)}, "in pairs"),
    ):
        save_file({**good, **change}, file)
        with pytest.raises(RevisionCorrupt, match=complaint):
            engine.stage("candidate", path, None)
    file.write_bytes(b"")
    with pytest.raises(RevisionCorrupt, match="no safetensors"):
        engine.stage("candidate", path, None)
    assert engine.stats()["staged"] == [BASE]
    assert not list(engine.lineage._folder.glob(".*.tmp"))
    ledger.write(tmp_path / "ledger", ledger.Ledger(0, [Step(1, 1.0, 1e-3, 1e-3)]))
    with pytest.raises(Conflict, match="adapters alone"):
        finished(engine.collecting(tmp_path / "ledger", tmp_path / "x.gguf", "gguf"))
    with pytest.raises(InvalidRequest, match="kind"):
        background.rule(LearningRule(adapters=AdapterSpec("nonesuch", 4, 8.0, 1)))
    background.rule(LearningRule(adapters=ZO_LORA))
    with pytest.raises(InvalidRequest, match="nothing learns by backpropagation"):
        last(background.descend(examples, 0.1, 1, 0.0, 1e-2))


def test_the_hybrid_moves_everything_with_both(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    """LoHo: zeroth-order steps move the blocks too that backpropagation moves now and then."""
    background.rule(LearningRule(blocks=1, everywhere=True))
    moved = []
    for step in (lambda: background.update(3, 1e-3), lambda: last(background.descend(examples, 0.1, 4, 0.0, 1e-2))):
        before = {name: tensor.clone() for name, tensor in background._current.tensors.items()}
        step()
        after = background._current.tensors
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
    everything, suffix = moved
    assert suffix < everything == set(engine.model.base.tensors)
    assert all(name.startswith(("model.layers.3.", "model.norm.")) for name in suffix)
