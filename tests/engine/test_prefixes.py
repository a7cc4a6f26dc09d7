"""What prompts begin with is computed once: beyond slots, restarts and swaps; told by tokens that were not computed."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp as lc
import pytest

from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.protocol import Sampling
from agentd.errors import RevisionCorrupt
from tests.support.engine_samples import GREEDY, ask, finish, raw, write_lora

FREE = Sampling(temperature=0)
SYSTEM = "You run a house. " + " ".join(f"Tool {i} turns lamp {i} on and off, and says how it is." for i in range(16))
OTHERS = [" ".join(f"{word} number {i} is not {i + 1}." for i in range(24)) for word in ("Day", "Night")]
LONG = 200  # tokens that SYSTEM has at least


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"folder": str(folder / "prefixes"), "memory": 1 << 26, "disk": 1 << 26, "key": "model", **changes}


def start(model: Path, folder: Path, slots: int = 1, **changes: Any) -> LlamaCppEngine:
    return LlamaCppEngine(model, context=768, slots=slots, threads=1, prefixes=settings(folder, **changes))


@pytest.fixture
def engine(model_path: Path, tmp_path: Path) -> Iterator[LlamaCppEngine]:
    local = start(model_path, tmp_path)
    yield local
    local.close()


def asked(engine: LlamaCppEngine, key: str, question: str, sampling: Sampling = FREE, **more: Any) -> Any:
    """The last piece of an answer about the house, and what the engine does when it is idle."""
    answer = ask(engine, replace(raw(key, f"{SYSTEM} {question}", sampling, max_tokens=4), **more))[0]
    while engine.tend():
        pass
    return answer.last


def crowd(engine: LlamaCppEngine) -> None:
    """Others, who need the slots."""
    for i, text in enumerate(OTHERS):
        ask(engine, raw(f"other {i}", text, FREE, max_tokens=2))
        while engine.tend():
            pass


def files(folder: Path) -> list[Path]:
    return sorted((folder / "prefixes").glob("*"))


def written(folder: Path, n: int) -> list[Path]:
    deadline = time.monotonic() + 60
    while len([path for path in files(folder) if not path.name.startswith(".")]) < n:
        assert time.monotonic() < deadline, files(folder)
        time.sleep(0.01)
    return files(folder)


def test_a_prefix_is_there_after_others_had_its_slot(engine: LlamaCppEngine) -> None:
    assert asked(engine, "first", "Is lamp 3 on?").cached_tokens == 0
    crowd(engine)
    later = asked(engine, "later", "And lamp 9?")
    assert later.cached_tokens > LONG
    assert later.prompt_tokens - later.cached_tokens < 12


def test_an_exact_answer_is_the_same_from_a_prefix_and_takes_only_whole_pieces(engine: LlamaCppEngine) -> None:
    seeded = Sampling(temperature=1.0, seed=5)
    request = raw("cold", f"{SYSTEM} Say something.", seeded, max_tokens=16, logprobs=0)
    cold = ask(engine, request)[0]
    crowd(engine)
    warm = ask(engine, replace(request, key="warm"))[0]
    assert warm.last.cached_tokens > LONG
    assert warm.last.cached_tokens in (192, 256, 512)  # a boundary of pieces
    assert (warm.text, warm.logprobs) == (cold.text, cold.logprobs)


def test_what_was_not_computed_exactly_is_no_part_of_an_exact_answer(engine: LlamaCppEngine) -> None:
    asked(engine, "free", "Is lamp 3 on?")  # alone, so in pieces of the longest
    crowd(engine)
    exact = asked(engine, "exact", "Is lamp 3 on?", GREEDY)
    assert exact.cached_tokens == 0


def test_a_prefix_survives_a_restart_in_a_file_for_its_owner_alone(model_path: Path, tmp_path: Path) -> None:
    first = start(model_path, tmp_path)
    asked(first, "first", "Is lamp 3 on?")
    (path,) = written(tmp_path, 1)
    first.close()
    assert path.stat().st_mode & 0o777 == 0o600
    second = start(model_path, tmp_path)
    assert asked(second, "second", "And lamp 9?").cached_tokens > LONG
    second.close()
    other = start(model_path, tmp_path, key="another model")
    assert asked(other, "third", "And lamp 9?").cached_tokens == 0
    assert path not in files(tmp_path)
    other.close()


def test_who_leaves_while_a_prefix_is_read_leaves_nothing_behind(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(model_path, tmp_path)
    asked(first, "first", "Is lamp 3 on?")
    written(tmp_path, 1)
    first.close()
    freed: list[object] = []
    free = lc.llama_sampler_free

    def count(chain: object) -> None:
        freed.append(chain)
        free(chain)

    monkeypatch.setattr(lc, "llama_sampler_free", count)
    second = start(model_path, tmp_path)
    second.submit(raw("gone", f"{SYSTEM} And lamp 9?", FREE))
    second.cancel("gone")
    assert not second.busy
    assert len(freed) == 1
    second.close()


@pytest.mark.parametrize("damage", ["state", "cut", "head", "left over"])
def test_a_damaged_file_is_dropped_and_said(
    model_path: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(model_path, tmp_path)
    asked(first, "first", "Is lamp 3 on?")
    (path,) = written(tmp_path, 1)
    first.close()
    data = bytearray(path.read_bytes())
    if damage == "state":
        data[-5] ^= 1
    elif damage == "head":
        data[3] ^= 1
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage == "left over":
        path.rename(path.with_name("." + path.name))
    second = start(model_path, tmp_path)
    assert asked(second, "second", "And lamp 9?").cached_tokens == 0
    assert "dropped" in caplog.text
    assert path.read_bytes() != data if path.exists() else True
    second.close()


def test_what_is_forgotten_is_gone_from_slots_memory_and_files(engine: LlamaCppEngine, tmp_path: Path) -> None:
    asked(engine, "first", "Is lamp 3 on?")
    written(tmp_path, 1)
    engine.forget(time.time() - 60)  # what is older than this
    assert files(tmp_path)
    assert asked(engine, "still", "Is lamp 3 on?").cached_tokens > LONG
    engine.submit(raw("running", f"{SYSTEM} Is lamp 4 on?", FREE, max_tokens=4))
    engine.step()
    engine.forget(None)
    assert not files(tmp_path)
    finish(engine)
    while engine.tend():
        pass
    assert not engine._prefixes.store  # type: ignore[union-attr]  # nor of who was being answered
    crowd(engine)
    assert asked(engine, "later", "And lamp 9?").cached_tokens == 0


def test_of_a_request_that_is_not_recorded_nothing_is_kept(engine: LlamaCppEngine, tmp_path: Path) -> None:
    asked(engine, "private", "Is lamp 3 on?", private=True)
    crowd(engine)
    assert asked(engine, "later", "And lamp 9?").cached_tokens == 0


def test_memory_and_disk_have_limits(model_path: Path, tmp_path: Path) -> None:
    probe = start(model_path, tmp_path / "probe")
    asked(probe, "first", "Is lamp 3 on?")
    size = probe._prefixes.store.bytes_in_memory  # type: ignore[union-attr]
    probe.close()
    engine = start(model_path, tmp_path, memory=int(1.5 * size), disk=int(1.5 * size))
    store = engine._prefixes.store  # type: ignore[union-attr]
    for i in range(5):
        ask(engine, raw(f"long {i}", f"{i} {OTHERS[0]} {SYSTEM}", FREE, max_tokens=2))
        while engine.tend():
            pass
        assert store.bytes_in_memory <= 1.5 * size
    engine.close()
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 1.5 * size + (1 << 16)


def test_a_session_leaves_the_memory_that_is_not_taken_yet(engine: LlamaCppEngine) -> None:
    background = engine.background(lambda: False)
    asked(engine, "first", "Is lamp 3 on?")
    crowd(engine)
    assert engine._prefixes.store.bytes_in_memory == 0  # type: ignore[union-attr]
    background.close()


def test_a_disk_that_is_full_keeps_no_prefix_and_nothing_else_hangs_on_it(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("agentd.durable.os.fsync", full)
    asked(engine, "first", "Is lamp 3 on?")
    crowd(engine)
    assert asked(engine, "later", "And lamp 9?").cached_tokens > LONG


def warm(engine: LlamaCppEngine, weights: str) -> int:
    steps = engine.warming(weights, lambda: False)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return int(end.value)


@pytest.mark.parametrize("slots", [1, 2])
def test_right_after_a_swap_and_a_rollback_a_prefix_is_there(model_path: Path, tmp_path: Path, slots: int) -> None:
    engine = start(model_path, tmp_path, slots)
    asked(engine, "first", "Is lamp 3 on?")
    asked(engine, "second", "Is lamp 5 on?")
    lora = write_lora(tmp_path / "revision.gguf", model_path, size=4.0)
    engine.stage("1", lora, None)
    assert warm(engine, "1") > LONG
    before = asked(engine, "before", "And lamp 9?")
    assert (before.revision, before.cached_tokens > LONG) == (0, True)
    engine.swap("1")
    seeded = ask(engine, raw("new", f"{SYSTEM} And lamp 9?", GREEDY, max_tokens=8))[0]
    assert seeded.last.revision == 1
    assert seeded.last.cached_tokens > LONG - 10
    cold = start(model_path, tmp_path / "cold")
    cold.stage("1", lora, None)
    cold.swap("1")
    assert ask(cold, raw("cold", f"{SYSTEM} And lamp 9?", GREEDY, max_tokens=8))[0].text == seeded.text
    cold.close()
    assert asked(engine, "after", "And lamp 10?").cached_tokens > LONG
    assert warm(engine, "0") == 0  # it is there still
    engine.swap("0")
    back = asked(engine, "back", "And lamp 11?")
    assert (back.revision, back.cached_tokens > LONG) == (0, True)
    engine.close()


def test_what_no_one_used_again_keeps_no_swap_waiting(engine: LlamaCppEngine, model_path: Path, tmp_path: Path) -> None:
    asked(engine, "first", "Is lamp 3 on?")
    engine.stage("1", write_lora(tmp_path / "revision.gguf", model_path), None)
    assert warm(engine, "1") == 0


def test_a_request_comes_before_what_is_computed_for_a_swap(model_path: Path, tmp_path: Path) -> None:
    engine = start(model_path, tmp_path)
    asked(engine, "first", "Is lamp 3 on?")
    asked(engine, "second", "Is lamp 5 on?")
    engine.stage("1", write_lora(tmp_path / "revision.gguf", model_path), None)
    polls = []

    def interrupted() -> bool:
        polls.append(True)
        return len(polls) == 20  # in the middle of a forward pass

    steps = engine.warming("1", interrupted)
    while len(polls) < 20:
        next(steps)
    answer = asked(engine, "between", "And lamp 9?")  # it takes the only slot
    assert (answer.revision, answer.completion_tokens) == (0, 4)
    for _ in steps:
        pass
    engine.swap("1")
    assert asked(engine, "after", "And lamp 10?").cached_tokens > LONG
    engine.close()


def test_weights_that_were_freed_are_not_computed_with_any_more(
    engine: LlamaCppEngine, model_path: Path, tmp_path: Path
) -> None:
    """Who is served may keep what is computed for a swap waiting until the swap was taken back."""
    asked(engine, "first", "Is lamp 3 on?")
    asked(engine, "second", "Is lamp 5 on?")
    lora = write_lora(tmp_path / "revision.gguf", model_path, size=4.0)
    for again in (False, True):
        engine.stage("1", lora, None)
        steps = engine.warming("1", lambda: False)
        assert not any(next(steps) for _ in range(3))
        engine.swap("1")
        engine.swap("0")
        engine.unstage("1")
        assert (engine.stats()["staged"], engine.stats()["leaving"]) == (["0"], 0)
        if again:
            engine.stage("1", lora, None)
            assert list(steps) == []
        else:
            with pytest.raises(RevisionCorrupt, match="not staged"):
                next(steps)
        engine.unstage("1")
    assert asked(engine, "after", "And lamp 9?").revision == 0
