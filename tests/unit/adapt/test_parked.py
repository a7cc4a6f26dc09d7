"""What a pass leaves to go on from: its examples as it read them, and another setting where its own fits no more."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentd.adapt.passes import parked
from agentd.adapt.passes.llamacpp import AdaptationPass
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.adapt.running_pass import PassContext
from agentd.config import schema as configuration
from agentd.formats import training_state
from agentd.formats.training_state import TrainingState
from agentd.store import examples, passes, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "agentd.db")) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "passes" / "1"
    folder.mkdir(parents=True)
    return folder


def put(store: Store, n: int, label: str) -> str:
    input = {"messages": [{"role": "user", "content": f"text {n}"}]}
    return store.do(examples.add, NewExample("t", "label", input, label)).id


@pytest.fixture
def data(store: Store) -> Dataset:
    for n in range(4):
        put(store, n, "yes" if n % 2 else "no")
    task = store.do(tasks.get, "t")
    recalled = {"turns": [[{"role": "user", "content": "before"}]], "tokens": 20}
    members = [
        Member(i, example, "train", task, recalled=recalled if i == 1 else None)
        for i, example in enumerate(store.do(examples.list_, 10))
    ]
    return Dataset(members, {"u": "waits"}, undrawn=["other"])


def write_state(folder: Path, **context: Any) -> None:
    (folder / "matrices").write_bytes(b"matrices")
    section = training_state.part_of_file("adapter", folder / "matrices")
    place = {"step": 40, "steps": 80, "scale": 0.25}
    training_state.write(folder / parked.STATE, {"place": place, "moves": 2, **context}, [section])


def test_the_examples_are_those_that_were_read_and_it_is_known_which_are_gone(
    store: Store, data: Dataset, folder: Path
) -> None:
    own = [Member(9, data.members[0].example, "replay", data.members[0].task, whole=False)]
    parked.write(folder, data, own)
    assert parked.read(folder) is None, "no training to go on with"
    write_state(folder)
    read = parked.read(folder)
    assert read is not None
    assert (read.data, list(read.own), read.place) == (data, own, [2, 40, 0])
    before = parked.identity("sha", 1, read.data.members)
    put(store, 1, "no")  # corrected: that is for the next pass
    assert store.do(parked.forgotten, read.data) == 0
    store.do(lambda db: db.execute("DELETE FROM examples WHERE id = ?", [data.members[2].example.id]))
    assert store.do(parked.forgotten, read.data) == 1
    assert parked.identity("sha", 1, read.data.members[1:]) != before != parked.identity("sha", 2, data.members)
    (folder / ".training.state.7.tmp").touch()
    parked.tidy(folder.parent, int(folder.name))
    assert parked.read(folder) == read
    assert not list(folder.glob("*.tmp"))
    parked.tidy(folder.parent, None)
    assert parked.read(folder) is None


@pytest.mark.parametrize("blocks", [2, 1])
def test_with_another_setting_it_goes_on_from_the_matrices(folder: Path, blocks: int) -> None:
    context = {"new": {"adapter.gguf": "1-adapter.gguf"}, "zo": [[7, 0.5, 0.25, 0.125]], "scale": 0.25, "at": 10}
    write_state(folder, method="suffix-bp", blocks=2, steps=90, **context)
    state = TrainingState.read(folder / parked.STATE)
    setting, control = SimpleNamespace(method="suffix-bp", blocks=blocks), SimpleNamespace(moves=0)
    attempt: Any = SimpleNamespace(_folder=folder, _setting=setting, _control=control)
    went_on = AdaptationPass._go_on(attempt, state)
    assert control.moves == 2
    assert attempt._steps[0].coefficient == -0.125
    adapter = attempt._new["adapter.gguf"]
    if blocks == 2:
        assert (went_on, attempt._step_scale, adapter.name) == ((10, 90, True), 0.25, "1-adapter.gguf")
    else:
        assert (went_on, attempt._step_scale, adapter.read_bytes()) == ((40, 80, False), 0.0625, b"matrices")


def test_a_pass_that_cannot_go_on_ends_with_the_reason(store: Store, data: Dataset, folder: Path) -> None:
    parked.write(folder, data, [])
    write_state(folder)
    whole = parked.read(folder)

    def resume(left: parked.Parked | None, serving: int = 0) -> tuple[str, str | None]:
        row = store.do(passes.create, "manual", 0, 0, {})
        store.do(passes.advance, row.id, "parked")
        reason = store.do(parked.resume, row, left, serving)
        after = store.do(passes.get, row.id)
        assert after.reason == reason
        return after.state, reason

    assert resume(whole) == ("resumed", None)
    assert resume(None) == ("failed", "what it was to go on from is gone or damaged")
    assert resume(whole, serving=3) == ("failed", "it began at revision 0, and revision 3 serves now")
    store.do(lambda db: db.execute("DELETE FROM examples WHERE id = ?", [data.members[2].example.id]))
    assert resume(whole) == ("failed", "1 of its examples were forgotten")


def test_what_a_parked_pass_waits_for() -> None:
    config = configuration.load(None, {})
    quiet = config.adapt.trigger.model_copy(update={"quiet_hours": "00:00-24:00"})
    off = config.model_copy(update={"adapt": config.adapt.model_copy(update={"enabled": False})})
    night = config.model_copy(update={"adapt": config.adapt.model_copy(update={"trigger": quiet})})
    free = {"paused": lambda: False, "config": lambda: config, "engine": SimpleNamespace(ready=True)}
    free |= {"activity": SimpleNamespace(held=False), "store": SimpleNamespace(problem=None)}

    def waits(trigger: str = "examples", **other: Any) -> str:
        context: Any = SimpleNamespace(**{**free, **other})
        return PassContext.held_back(context, trigger) or ""

    assert waits() == ""
    assert "engine" in waits(engine=SimpleNamespace(ready=False))
    assert "agentctl resume" in waits(paused=lambda: True)
    assert "holds" in waits(activity=SimpleNamespace(held=True))
    assert "disk" in waits(store=SimpleNamespace(problem="full"))
    assert "adapt.enabled" in waits(config=lambda: off)
    assert waits("manual", config=lambda: off) == ""
    assert "quiet hours" in waits(config=lambda: night)
