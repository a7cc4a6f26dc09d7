"""What prompts begin with is computed once in this engine too: beyond slots and restarts, by its own weights alone."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentd.engine.protocol import BASE, Sampling
from agentd.engine.transformers.engine import TransformersEngine
from agentd.learn import ledger
from agentd.learn.ledger import Step
from tests.engine.transformers.test_architectures import checkpoint
from tests.support.engine_samples import ask, finish, raw
from tools import tiny_model

FREE, SEEDED = Sampling(temperature=0), Sampling(temperature=1.0, seed=5)
SYSTEM = "You run a house. " + "".join(f"Tool {i} turns lamp {i}. " for i in range(12))
LONG = 200  # tokens that SYSTEM has at least; one is a byte
Start = Callable[..., TransformersEngine]


@pytest.fixture
def start(dtype: str, tmp_path: Path) -> Iterator[Start]:
    path = tiny_model.write(tmp_path / "tiny.gguf")
    started: list[TransformersEngine] = []

    def make(path: Path = path, **changes: Any) -> TransformersEngine:
        kept = {"folder": str(tmp_path / "prefixes"), "memory": 1 << 24, "disk": 1 << 24, "key": "model", **changes}
        engine = TransformersEngine(
            path, folder=tmp_path / "weights", key="k" * 20, context=768, slots=1, dtype=dtype, prefixes=kept
        )
        started.append(engine)
        return engine

    yield make
    for engine in started:
        engine.close()


def asked(engine: TransformersEngine, key: str, question: str, sampling: Sampling = FREE, **more: Any) -> Any:
    answer = ask(engine, raw(key, f"{SYSTEM} {question}", sampling, max_tokens=6, logprobs=0, **more))[0]
    while engine.tend():
        pass
    return answer


def crowd(engine: TransformersEngine) -> None:
    """Others, who need the slot."""
    for word in ("Day", "Night"):
        ask(engine, raw(word, f"{word} is not what it was. " * 9, FREE, max_tokens=2))
        while engine.tend():
            pass


def test_a_prefix_is_there_after_others_had_its_slot(start: Start) -> None:
    engine = start()
    assert asked(engine, "first", "Is lamp 3 on?").last.cached_tokens == 0
    crowd(engine)
    later = asked(engine, "later", "And lamp 9?")
    assert later.last.cached_tokens > LONG
    assert later.last.prompt_tokens - later.last.cached_tokens < 16


def test_an_exact_answer_is_the_same_from_a_prefix_to_the_bit(start: Start) -> None:
    engine = start()
    cold = asked(engine, "cold", "Say something.", SEEDED)
    crowd(engine)
    warm = asked(engine, "warm", "Say something.", SEEDED)
    assert warm.last.cached_tokens in (192, 256)  # a boundary of pieces
    assert (warm.text, warm.logprobs) == (cold.text, cold.logprobs)


def test_a_prefix_survives_a_restart_but_not_another_model(start: Start, tmp_path: Path) -> None:
    first = start()
    asked(first, "first", "Is lamp 3 on?")
    first.close()
    (path,) = (tmp_path / "prefixes").glob("*.prefix")
    assert asked(start(), "second", "And lamp 9?").last.cached_tokens > LONG
    assert asked(start(key="another"), "third", "And lamp 9?").last.cached_tokens == 0
    assert not path.exists()


def test_what_cannot_be_read_is_computed(start: Start) -> None:
    engine = start()
    clean = asked(engine, "first", "Is lamp 3 on?")
    crowd(engine)
    assert engine._prefixes is not None
    for prefix in engine._prefixes.store._prefixes:
        assert prefix.state is not None
        prefix.state[8] ^= 1  # another length than there are numbers for
    again = asked(engine, "again", "Is lamp 3 on?")
    assert again.last.cached_tokens == 0
    assert again.text == clean.text


def test_other_weights_compute_their_own(start: Start, tmp_path: Path) -> None:
    engine = start()
    clean = asked(engine, "base", "Is lamp 3 on?", SEEDED)
    asked(engine, "base too", "And lamp 4?")
    ledger.write(tmp_path / "ledger", ledger.Ledger(0, [Step(7, 1.0, 1e-2, 1e-3)]))
    engine.stage("1", tmp_path / "ledger", None)
    warming = engine.warming("1", lambda: False)
    computed = 0
    while True:
        try:
            next(warming)
        except StopIteration as stop:
            computed = stop.value
            break
    assert computed > LONG
    engine.swap("1")
    moved = asked(engine, "moved", "Is lamp 3 on?", SEEDED)
    assert moved.last.cached_tokens >= 192, "it was computed before the swap"
    engine.forget(None)
    cold = asked(engine, "cold", "Is lamp 3 on?", SEEDED)
    assert cold.last.cached_tokens == 0
    assert (cold.text, cold.logprobs) == (moved.text, moved.logprobs)
    assert cold.logprobs != clean.logprobs
    engine.swap(BASE)
    assert asked(engine, "back", "Is lamp 3 on?", SEEDED).logprobs == clean.logprobs


def test_warming_gives_way_in_the_middle_of_a_forward(start: Start, tmp_path: Path) -> None:
    engine = start()
    clean = asked(engine, "base", "Is lamp 3 on?", SEEDED)
    asked(engine, "base too", "Is lamp 3 on?", SEEDED)
    ledger.write(tmp_path / "ledger", ledger.Ledger(0, [Step(7, 1.0, 1e-2, 1e-3)]))
    engine.stage("1", tmp_path / "ledger", None)
    polls = 0

    def interrupted() -> bool:
        nonlocal polls
        polls += 1
        return polls == 2

    for number, _ in enumerate(engine.warming("1", interrupted)):
        if number < 3:
            assert asked(engine, "meanwhile", "Is lamp 3 on?", SEEDED).logprobs == clean.logprobs
    assert polls > tiny_model.N_BLOCKS
    engine.swap("1")
    assert asked(engine, "moved", "Is lamp 3 on?", SEEDED).last.cached_tokens >= 192


def test_what_is_private_or_forgotten_is_not_kept(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.submit(replace(raw("private", SYSTEM, FREE, max_tokens=2), private=True))
    finish(engine)
    crowd(engine)
    assert asked(engine, "later", "And lamp 9?").last.cached_tokens == 0
    engine.forget(time.time() + 1)
    assert not list((tmp_path / "prefixes").glob("[!.]*"))
    crowd(engine)
    assert asked(engine, "last", "And lamp 9?").last.cached_tokens == 0


def test_states_that_cannot_be_cut_are_not_kept(start: Start, tmp_path: Path) -> None:
    engine = start(checkpoint("lfm2", tmp_path))
    assert engine._prefixes is None
    asked(engine, "first", "Is lamp 3 on?")
    assert asked(engine, "second", "Is lamp 3 on?").last.cached_tokens == 0
