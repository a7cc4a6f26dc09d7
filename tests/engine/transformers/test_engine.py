"""What is the transformers engine's own: its weights learn in place while it serves, by the block and to the bit."""

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from agentd.engine.probabilities import Floats
from agentd.engine.protocol import BASE, InPlaceBackground, LearningRule, Replaying, Sampling
from agentd.engine.transformers.background import TransformersBackground
from agentd.engine.transformers.engine import TransformersEngine
from agentd.engine.transformers.forward import Forward, pack
from agentd.engine.transformers.image import digest
from agentd.engine.transformers.model import Model
from agentd.engine.transformers.sampling import TokenSampler
from agentd.errors import InvalidRequest, ModelUnusable, NotSupported, RevisionCorrupt
from agentd.learn import ledger
from agentd.learn.encoded import Encoded
from agentd.learn.ledger import Step
from tests.support.engine_samples import CHOICES, REVIEWS, ask, chat, last, raw, review
from tools import tiny_model

STEPS = [Step(10 + i, (-1.0) ** i, 1e-3, 1e-3) for i in range(6)]


def write(path: Path, steps: list[Step], parent: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ledger.write(path, ledger.Ledger(parent, steps))
    return path


def test_it_is_what_the_runner_asks_for(engine: TransformersEngine, background: TransformersBackground) -> None:
    assert isinstance(engine, Replaying)
    assert isinstance(background, InPlaceBackground)
    assert engine.info.architecture == "llama"
    assert engine.info.n_layer == tiny_model.N_BLOCKS


def test_serving_sees_the_committed_weights_between_the_steps_of_a_run(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    request = chat("q", "What now?", logprobs=0, max_tokens=6)
    clean = ask(engine, request)[0].logprobs
    before = digest(engine.model.base.mapped)
    for step in STEPS:
        last(background.pair(examples, 0.1, step.seed, 1e-3))
        assert ask(engine, request)[0].logprobs == clean
        background.update(step.seed, step.coefficient)
        assert ask(engine, request)[0].logprobs == clean
    assert background.digest() != before
    assert digest(engine.model.base.mapped) == before
    background.use(BASE)
    assert background.digest() == before


def test_a_prompt_is_cut_where_padding_would_end(
    engine: TransformersEngine, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a piece of fewer tokens takes as long as one of 64, so there are no pieces of 32."""
    pieces: list[int] = []
    forward = engine.model.forward

    def counted(tokens: Sequence[int], keep: Sequence[int], **arguments: Any) -> torch.Tensor:
        pieces.append(len(tokens))
        return forward(tokens, keep, **arguments)

    monkeypatch.setattr(engine.model, "forward", counted)
    answer = ask(engine, raw("cut", "unheard of " * 8, max_tokens=1))[0]
    n = answer.last.prompt_tokens
    assert 64 < n < 96
    assert answer.last.cached_tokens == 0
    assert pieces == ([64, 64] if dtype == "bfloat16" else [32, 32, n - 64])


def test_staging_replays_to_the_weights_that_the_run_had(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded], tmp_path: Path
) -> None:
    scores = last(background.score(examples))
    for step in STEPS:
        last(background.loss(examples, 0.1, step.seed, 1e-3))
        background.update(step.seed, step.coefficient)
    moved, reached = last(background.score(examples)), background.digest()
    assert moved != scores
    engine.stage("candidate", write(tmp_path / "ledger", STEPS), None)
    background.use("candidate")
    assert background.digest() == reached
    assert last(background.score(examples)) == moved
    engine.swap("candidate")
    engine.swap(BASE)
    background.use(BASE)
    assert last(background.score(examples)) == scores


def test_a_line_of_ledgers_is_replayed_from_the_base(
    engine: TransformersEngine, tmp_path: Path, shared_engine: Any
) -> None:
    whole = write(tmp_path / "whole", STEPS)
    engine.stage("whole", whole, None)
    revisions = engine.lineage._revisions
    assert revisions is not None
    write(revisions / "1" / "ledger", STEPS[:2])
    write(revisions / "2" / "ledger", STEPS[2:3], parent=1)
    engine.stage("3", write(revisions / "3" / "ledger", STEPS[3:], parent=2), None)
    digests = [digest(engine._registry[name].mapped) for name in ("whole", "3")]
    assert digests[0] == digests[1]
    with pytest.raises(RevisionCorrupt, match="ledger cannot be read"):
        engine.stage("9", write(tmp_path / "orphan", STEPS, parent=77), None)


def test_a_manifest_s_sha256_is_checked_and_its_type_too(
    engine: TransformersEngine, tmp_path: Path, dtype: str
) -> None:
    path = write(tmp_path / "r" / "ledger", STEPS)
    (path.parent / "manifest.json").write_text('{"weights_sha256": "' + "0" * 64 + '"}')
    with pytest.raises(RevisionCorrupt, match="replaying its ledger gives weights"):
        engine.stage("1", path, None)
    other = "bfloat16" if dtype == "float32" else "float32"
    (path.parent / "manifest.json").write_text('{"dtype": "' + other + '"}')
    with pytest.raises(RevisionCorrupt, match=rf"learned in {other}.*model\.dtype"):
        engine.stage("1", path, None)
    assert engine.stats()["staged"] == [BASE]


def test_what_is_no_ledger_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    good = write(tmp_path / "ledger", STEPS).read_bytes()
    for name, data in (("cut", good[:-9]), ("noise", b"AGENTDZO" + bytes(99)), ("other", b"GGUF" + bytes(99))):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(RevisionCorrupt, match=r"revision 2 cannot be used: ."):
            engine.stage("2", path, None)
    with pytest.raises(RevisionCorrupt, match="cannot be read"):
        engine.stage("2", tmp_path / "missing", None)
    with pytest.raises(RevisionCorrupt, match="control vectors"):
        engine.stage("2", None, tmp_path / "control.gguf")
    huge = [Step(1, 1e30, 1e8, 1e-3)] * 5
    with pytest.raises(RevisionCorrupt, match="not finite"):
        engine.stage("2", write(tmp_path / "huge", huge), None)
    assert engine.stats()["staged"] == [BASE]
    assert not list(engine.lineage._folder.glob(".*.tmp"))


def test_scores_are_those_of_each_sequence_by_itself(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    several = background.encode(review("Fine."), ["It was wonderful", "It was terrible"], "It was terrible")
    scores = last(background.score([several]))[0]
    room = 1e-4 if engine.model.dtype == torch.float32 else 0.1
    for value, terms in zip(scores.choices, several.choices, strict=True):
        expected = 0.0
        for s, p, token in terms:
            logits = engine.model.forward(several.sequences[s][: p + 1], [p], use_cache=False)
            expected += float(torch.log_softmax(logits, -1)[0, token])
        assert value == pytest.approx(expected, abs=room * len(terms))


def test_a_long_beginning_is_not_computed_for_every_example(
    engine: TransformersEngine, background: TransformersBackground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentd.engine.transformers.background.WIDTH", 256)
    inputs = [
        {"messages": [{"role": "system", "content": "Be kind. " * 24}, *review(text)["messages"]]} for text in "abc"
    ]
    examples = [background.encode(input, CHOICES, CHOICES[0]) for input in inputs]
    alone = [score.choices for example in examples for score in last(background.score([example]))]
    forwards: list[int] = []
    forward = engine.model.forward

    def counted(tokens: Sequence[int], *rest: Any, **more: Any) -> torch.Tensor:
        forwards.append(len(tokens))
        return forward(tokens, *rest, **more)

    monkeypatch.setattr(engine.model, "forward", counted)
    together = [score.choices for batch in background.score(examples) for score in batch]
    assert len(forwards) == 1, "the beginning is longer than all that follows it"
    room = 1e-4 if engine.model.dtype == torch.float32 else 0.3
    for some, others in zip(together, alone, strict=True):
        assert some == pytest.approx(others, abs=room)


def test_a_model_that_obeys_no_mask_is_run_a_sequence_at_a_time(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    assert Forward(engine.model).masks
    stubborn = Forward(engine.model)
    stubborn._masks = False
    laid = pack(examples[:3], 0)
    together, alone = Forward(engine.model).run(laid), stubborn.run(laid)
    assert set(together.index) == set(alone.index)
    room = 1e-4 if engine.model.dtype == torch.float32 else 0.3
    for place, row in together.index.items():
        assert (together.logits[row] - alone.logits[alone.index[place]]).abs().max() < room


def test_both_signs_are_those_of_the_loss(
    engine: TransformersEngine, background: TransformersBackground, examples: list[Encoded]
) -> None:
    plus, minus = last(background.pair(examples, 0.1, 3, 1e-3))
    assert plus == last(background.loss(examples, 0.1, 3, 1e-3))
    assert minus == last(background.loss(examples, 0.1, 3, -1e-3))
    assert minus != plus
    middle = last(background.loss(examples, 0.1, 3, 0.0))
    assert middle == pytest.approx((plus + minus) / 2, abs=0.05)


def test_sparse_steps_move_only_small_weights(engine: TransformersEngine, background: TransformersBackground) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    old = engine.model.base.tensors[name].clone()
    background.rule(LearningRule(sparsity=0.75))
    background.update(1, 1e-2)
    assert background._current.private
    new = background._current.tensors[name]
    changed = new != old
    assert 0.2 < changed.float().mean() < 0.26
    assert old[changed].abs().max() <= old[~changed].abs().min() + 1e-6
    background.rule(LearningRule("cauchy"))
    with pytest.raises(InvalidRequest, match="distribution"):
        background.update(1, 1e-2)


def test_a_candidate_takes_memory_for_what_it_writes_alone(
    engine: TransformersEngine, background: TransformersBackground
) -> None:
    def private() -> int:
        return sum(
            mapping.private_dirty
            for mapping in psutil.Process().memory_maps(grouped=False)
            if mapping.path.endswith(".safetensors")
        )

    size = engine.model.base.image.size
    assert private() == 0
    background.update(1, 1e-3)
    assert size <= private() <= size + (1 << 16)
    background.use(BASE)
    assert private() == 0


def test_only_the_weights_that_serve_stay_in_memory(engine: TransformersEngine, tmp_path: Path) -> None:
    def resident(weights: str) -> int:
        (path,) = engine._registry[weights].image.files
        return sum(m.rss for m in psutil.Process().memory_maps(grouped=False) if m.path == str(path))

    def scored() -> list[Any]:
        opened = engine.background(lambda: False)
        opened.use("1")
        scores = last(opened.score([opened.encode(review(text), CHOICES, label) for text, label in REVIEWS]))
        assert resident("1") > size / 2
        opened.close()
        return list(scores)

    engine.stage("1", write(tmp_path / "ledger", STEPS), None)
    size = engine.model.base.image.size
    before = scored()
    assert resident("1") == 0
    ask(engine, chat("q", "What now?"))
    assert resident(BASE) > size / 2
    engine.swap("1")
    assert resident(BASE) == 0
    ask(engine, chat("q", "What now?"))
    assert scored() == before
    assert resident("1") > size / 2


def test_other_settings_are_refused_clearly(
    engine: TransformersEngine, background: TransformersBackground, tmp_path: Path
) -> None:
    with pytest.raises(NotSupported, match="taps nothing"):
        background.tap([], range(1), tmp_path / "tap")
    with pytest.raises(NotSupported, match="ledger"):
        background.write_control(tmp_path / "control")


def test_weights_that_are_no_numbers_end_a_request_with_an_error(engine: TransformersEngine) -> None:
    sampler = TokenSampler(Sampling(temperature=0), None)
    for bad in (math.nan, -math.inf):
        logits = np.full(engine.info.n_vocab, bad, np.float32)
        with pytest.raises(Exception, match="not finite"):
            sampler.sample(0, partial(np.asarray, logits))


def drawn(engine: TransformersEngine, logits: Floats, **settings: Any) -> set[int]:
    sampler = TokenSampler(Sampling(seed=1, **settings), None)
    return {sampler.sample(0, lambda: logits) for _ in range(300)}


def test_top_k_top_p_and_min_p_cut_where_they_say(engine: TransformersEngine) -> None:
    n = engine.info.n_vocab
    logits = np.full(n, -20, np.float32)
    logits[[5, 6, 7, 8]] = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    free = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    assert drawn(engine, logits, **free) == {5, 6, 7, 8}
    assert drawn(engine, logits, **{**free, "top_k": 2}) == {5, 6}
    assert drawn(engine, logits, **{**free, "top_p": 0.69}) == {5, 6}
    assert drawn(engine, logits, **{**free, "top_p": 0.71}) == {5, 6, 7}
    assert drawn(engine, logits, **{**free, "min_p": 0.45}) == {5, 6, 7}
    assert drawn(engine, logits, **{**free, "temperature": 1e-3}) == {5}


def test_text_comes_back_from_its_tokens(engine: TransformersEngine) -> None:
    vocabulary = engine.vocabulary
    for text in ("naïve 😀🎉 café\n\n漢字", " yes  no ", "<|im_end|>", ""):
        tokens = vocabulary.tokenize(text)
        assert b"".join(vocabulary.piece(token) for token in tokens).decode() == text
    assert vocabulary.tokenize("<|im_end|>", special=True) == [vocabulary.end]
    assert vocabulary.piece(vocabulary.end) == b""
    assert vocabulary.piece(vocabulary.end, special=True) == b"<|im_end|>"
    with pytest.raises(InvalidRequest, match="surrogate"):
        vocabulary.tokenize("half \ud83d")


def test_an_image_is_made_once_and_a_damaged_model_is_named(tmp_path: Path) -> None:
    path = tiny_model.write(tmp_path / "tiny.gguf")
    settings: dict[str, Any] = {"folder": tmp_path / "weights", "key": "k" * 20, "context": 256, "dtype": "float32"}
    first = TransformersEngine(path, **settings)
    (image,) = (tmp_path / "weights").glob("base-*.safetensors")
    written = image.stat().st_mtime_ns
    sha256 = hashlib.sha256(image.read_bytes()).hexdigest()
    TransformersEngine(path, **settings).close()
    assert image.stat().st_mtime_ns == written
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(ModelUnusable, match="cut short"):
        TransformersEngine(path, **settings)
    image.unlink()
    TransformersEngine(path, **settings).close()
    assert hashlib.sha256(image.read_bytes()).hexdigest() == sha256
    first.close()
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(ModelUnusable, match="cut short"):
        TransformersEngine(path, **{**settings, "key": "other" * 4})


def test_it_is_tried_out_before_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request finds code compiled and weights read; a model that does not run is none."""
    settings: dict[str, Any] = {"folder": tmp_path / "weights", "key": "k" * 20, "context": 32, "dtype": "bfloat16"}
    path = tiny_model.write(tmp_path / "tiny.gguf")
    computed: list[int] = []
    forward = Model.forward

    def counted(model: Model, tokens: Sequence[int], keep: Sequence[int], **arguments: Any) -> torch.Tensor:
        computed.append(len(tokens))
        return forward(model, tokens, keep, **arguments)

    monkeypatch.setattr(Model, "forward", counted)
    engine = TransformersEngine(path, **settings)
    assert computed == [64, 1, 64, 1, 1, 1, 4]  # and how it computes several at once is compared with each by itself
    assert not engine.busy
    engine.close()

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Model, "forward", broken)
    with pytest.raises(ModelUnusable, match="it does not run: shapes cannot be multiplied"):
        TransformersEngine(path, **settings)
