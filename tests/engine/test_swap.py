"""Adapters come and go beside running requests, and leave no trace."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from agentd.engine.protocol import Engine
from agentd.errors import RevisionCorrupt
from tests.support.engine_samples import (
    ENGINES,
    Answer,
    ask,
    chat,
    finish,
    needs,
    review,
    write_control,
    write_lora,
    write_revision,
)

QUESTION = "Write a short line about the sea, the wind and a lighthouse that has not been lit for many years."


@pytest.fixture(scope="module", params=sorted(ENGINES))
def loaded(request: pytest.FixtureRequest, model_path: Path) -> Iterator[Engine]:
    local = ENGINES[request.param](model_path)
    yield local
    local.close()


@pytest.fixture
def engine(loaded: Engine) -> Iterator[Engine]:
    """The engine on its base, and afterwards on its base again."""
    yield loaded
    finish(loaded)
    loaded.swap("0")
    for weights in loaded.stats()["staged"]:
        loaded.unstage(weights)
    assert loaded.stats()["staged"] == ["0"]
    assert loaded.stats()["leaving"] == 0


@pytest.fixture
def revision(engine: Engine, tmp_path: Path, model_path: Path) -> Path:
    return write_revision(engine, tmp_path / "adapter", model_path)


@pytest.fixture
def control(tmp_path: Path, engine: Engine) -> Path:
    row = 3 * np.random.default_rng(0).standard_normal(engine.info.n_embd).astype(np.float32)
    return write_control(tmp_path / "control.gguf", [("direction.3", row)])


@pytest.mark.parametrize("kind", ["lora", "control", "both"])
def test_running_requests_finish_on_the_old_weights_and_new_ones_get_the_new(
    engine: Engine, revision: Path, control: Path, kind: str
) -> None:
    if kind != "lora":
        needs(engine, "control")
    base = ask(engine, chat("base", QUESTION))[0]
    engine.stage("1", revision if kind != "control" else None, control if kind != "lora" else None)
    engine.submit(chat("old", QUESTION))
    answers: dict[str, Answer] = {}
    for _ in range(4):
        for piece in engine.step():
            answers.setdefault(piece.key, Answer()).pieces.append(piece)
    assert engine.swap("1") < 0.02  # seconds
    engine.submit(chat("new", QUESTION))
    finish(engine, answers)
    assert answers["old"].text == base.text
    assert answers["new"].text != base.text
    assert {piece.revision for piece in answers["old"].pieces} == {0}
    assert {piece.revision for piece in answers["new"].pieces} == {1}
    again = ask(engine, chat("again", QUESTION))[0]
    assert again.text == answers["new"].text  # alone as beside a request on other weights


def test_after_a_rollback_answers_are_the_old_ones_token_for_token(engine: Engine, revision: Path) -> None:
    requests = [chat(f"r{i}", QUESTION + extra, logprobs=0) for i, extra in enumerate(["", " Be brief.", " Rhyme."])]
    before = [answer.logprobs for answer in ask(engine, *requests)]
    engine.stage("1", revision, None)
    engine.swap("1")
    changed = [answer.logprobs for answer in ask(engine, *requests)]  # warms the prompt caches of the new weights
    assert all(new != old for new, old in zip(changed, before, strict=True))
    engine.swap("0")
    first = ask(engine, *requests)
    assert [answer.logprobs for answer in first] == before
    assert first[0].last.cached_tokens == 0
    assert [answer.logprobs for answer in ask(engine, *requests)] == before  # from the cache too
    engine.swap("1")
    assert [answer.logprobs for answer in ask(engine, *requests)] == changed


Damage = Callable[[Path, Path, Engine], tuple[Path | None, Path | None]]


def _truncated(good: Path, model: Path, engine: Engine) -> tuple[Path, None]:
    path = good.with_name("cut.gguf")
    path.write_bytes(good.read_bytes()[:-4000])
    return path, None


def _no_gguf(good: Path, model: Path, engine: Engine) -> tuple[Path, None]:
    path = good.with_name("noise.gguf")
    path.write_bytes(b"GGUF" + bytes(range(256)) * 40)
    return path, None


def _control(row: "np.typing.NDArray[np.float32]", name: str = "direction.3") -> Damage:
    def damage(good: Path, model: Path, engine: Engine) -> tuple[None, Path]:
        whole = row if row.size != 1 else np.full(engine.info.n_embd, row[0], np.float32)
        return None, write_control(good.with_name("wrong-control.gguf"), [(name, whole)])

    return damage


DAMAGE: dict[str, Damage] = {
    "truncated": _truncated,
    "no gguf": _no_gguf,
    "missing": lambda good, model, engine: (good.with_name("missing.gguf"), None),
    "a model": lambda good, model, engine: (model, None),
    "a control vector": lambda good, model, engine: (
        write_control(good.with_name("c.gguf"), [("direction.1", np.zeros(engine.info.n_embd, np.float32))]),
        None,
    ),
    "another architecture": lambda good, model, engine: (
        write_lora(good.with_name("gpt2.gguf"), model, architecture="gpt2"),
        None,
    ),
    "wrong shape": lambda good, model, engine: (write_lora(good.with_name("t.gguf"), model, transpose=True), None),
    "nan": lambda good, model, engine: (write_lora(good.with_name("nan.gguf"), model, poison=float("nan")), None),
    "infinite": lambda good, model, engine: (write_lora(good.with_name("inf.gguf"), model, poison=float("inf")), None),
    "control: a lora": lambda good, model, engine: (None, good),
    "control: nan": _control(np.array([np.nan], np.float32)),
    "control: width": _control(np.zeros(7, np.float32)),
    "control: layer": _control(np.array([1], np.float32), "direction.999"),
    "control: layer 0": _control(np.array([1], np.float32), "direction.0"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_revision_is_refused_and_serving_goes_on(
    engine: Engine, revision: Path, model_path: Path, damage: str
) -> None:
    needs(engine, "control")
    engine.stage("1", revision, None)
    engine.swap("1")
    before = ask(engine, chat("before", QUESTION, max_tokens=4))[0].text
    adapter, control = DAMAGE[damage](revision, model_path, engine)
    with pytest.raises(RevisionCorrupt, match=r"revision 2 cannot be used: ."):
        engine.stage("2", adapter, control)
    assert engine.stats()["staged"] == ["0", "1"]
    with pytest.raises(RevisionCorrupt, match="staged"):
        engine.swap("2")
    assert ask(engine, chat("after", QUESTION, max_tokens=4))[0].text == before


def test_what_still_answers_is_not_freed_before_it_has_answered(
    engine: Engine, revision: Path, model_path: Path
) -> None:
    engine.stage("1", revision, None)
    engine.swap("1")
    expected = ask(engine, chat("expected", QUESTION))[0].text
    engine.submit(chat("running", QUESTION))
    begun = {"running": Answer([piece for _ in range(3) for piece in engine.step()])}
    engine.swap("0")
    engine.unstage("1")
    stats = engine.stats()
    assert (stats["staged"], stats["leaving"]) == (["0"], 1)
    engine.stage("1", write_revision(engine, revision.with_name("other"), model_path, seed=5), None)  # the same name
    assert finish(engine, begun)["running"].text == expected
    assert engine.stats()["leaving"] == 0
    engine.swap("1")
    assert ask(engine, chat("other", QUESTION))[0].text != expected


def test_what_background_work_uses_is_not_freed_under_it(engine: Engine, revision: Path) -> None:
    engine.stage("candidate", revision, None)
    background = engine.background(lambda: False)
    try:
        examples = [background.encode(review("Gorgeous."), ["positive", "negative"], "positive")]
        background.use("candidate")
        before = list(background.score(examples))
        engine.unstage("candidate")
        assert engine.stats()["leaving"] == 1
        assert list(background.score(examples)) == before
        background.use("0")
        assert engine.stats()["leaving"] == 0
        assert list(background.score(examples)) != before
        with pytest.raises(RevisionCorrupt, match="staged"):
            background.use("candidate")
    finally:
        background.close()


def test_what_serves_and_the_base_cannot_be_unstaged(engine: Engine, revision: Path) -> None:
    engine.stage("1", revision, None)
    engine.swap("1")
    expected = ask(engine, chat("a", QUESTION, max_tokens=4))[0].text
    for weights in ("0", "1", "unknown"):
        engine.unstage(weights)
    assert engine.stats()["staged"] == ["0", "1"]
    assert ask(engine, chat("b", QUESTION, max_tokens=4))[0].text == expected


def test_unstaging_gives_the_memory_back(engine: Engine, tmp_path: Path, model_path: Path) -> None:
    needs(engine, "control")
    big = write_lora(tmp_path / "big.gguf", model_path, rank=512)
    process = psutil.Process()
    sizes = []
    for i in range(1, 17):
        engine.stage(str(i), big, None)
        engine.swap(str(i))
        ask(engine, chat(str(i), "Hello", max_tokens=1))
        engine.swap("0")
        engine.unstage(str(i))
        sizes.append(process.memory_info().rss)
    # Twelve were loaded in between. The heap breathes by two or three of them: the least of the last sizes counts.
    assert min(sizes[-4:]) - sizes[3] < 4 * big.stat().st_size


def test_a_copy_of_an_adapter_gives_the_same_answers(engine: Engine, revision: Path) -> None:
    copy = Path(shutil.copy(revision, revision.with_name("copy")))
    texts = []
    for weights, path in (("1", revision), ("2", copy)):
        engine.stage(weights, path, None)
        engine.swap(weights)
        texts.append(ask(engine, chat(weights, QUESTION))[0].text)
    assert texts[0] == texts[1]
