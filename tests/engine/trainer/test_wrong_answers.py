"""Some answers are wrong: the others speak against them, and a training that was killed says so, too."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from agentd.learn.encoded import Encoded, shared_prefix
from agentd.trainer.learner import Score
from tests.engine.trainer.conftest import write_encoded
from tests.engine.trainer.test_parking import Trainer, one

PLACES = ("kitchen", "garden", "garage", "office", "attic", "cellar", "hall", "bath")
DEEDS = (("switch on", "light on"), ("turn off", "light off"), ("warm up", "heat on"), ("cool down", "heat off"))
N, N_DEV, WRONG, EPOCHS, BATCH = 96, 24, 18, 8, 4


@pytest.fixture(scope="module")
def commands(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Encoded], set[int]]:
    """Commands and what was to be done; which of them have the answer to another."""
    chance = random.Random(0)
    tail, end = llama.tokens("<|im_end|>\n<|im_start|>assistant\n"), llama.tokens("<|im_end|>")
    rows = [(chance.choice(PLACES), *chance.choice(DEEDS)) for _ in range(N + N_DEV)]
    wrong = set(chance.sample(range(N), WRONG))
    encoded = []
    for i, (place, deed, done) in enumerate(rows):
        if i in wrong:
            place_said, _, done_said = chance.choice([row for row in rows if (row[0], row[2]) != (place, done)])
        else:
            place_said, done_said = place, done
        prompt = llama.tokens(f"<|im_start|>user\n{deed} the {place}") + tail
        answer = llama.tokens(f"{done_said}: {place_said}") + end
        terms = [(0, len(prompt) - 1 + j, token) for j, token in enumerate(answer)]
        encoded.append(Encoded.of([prompt + answer[:-1]], [], 0, terms))
    return write_encoded(tmp_path_factory.mktemp("commands") / "encoded.jsonl", encoded), encoded, wrong


@pytest.fixture
def trainer(commands: Any, make_spec: Any, tmp_path: Path) -> Any:
    path, encoded, _ = commands
    spec = make_spec(2, tmp_path / "tap.f32", encoded=str(path), train=list(range(N)), dev=list(range(N, N + N_DEV)))
    spec |= {"states": "computed", "prefix": shared_prefix(encoded), "starts": [], "groups": [1] * (N + N_DEV)}

    def make(name: str, epochs: int, **changes: Any) -> Trainer:
        options = {"batch": BATCH, "max_epochs": epochs, "lr": 1e-2}
        return Trainer(tmp_path / name, {**spec, **changes}, **options)

    return make


def test_they_are_found(trainer: Any, commands: Any) -> None:
    *_, wrong = commands
    found = set(one(trainer("doubting", EPOCHS).run(), "done")["doubted"])
    assert len(found & wrong) >= WRONG / 2, (sorted(found), sorted(wrong))
    assert len(found - wrong) <= N / 20, (sorted(found), sorted(wrong))


def test_a_killed_training_doubts_the_same(trainer: Any) -> None:
    straight, killed = trainer("straight", 3), trainer("killed", 3)
    expected = one(straight.run(), "done")
    killed.run(2 * N // BATCH)
    done = one(killed.run(), "done")
    assert killed.output.read_bytes() == straight.output.read_bytes()
    assert done["doubted"] == expected["doubted"]


def test_a_state_is_judged_by_what_can_be_learned() -> None:
    """Small talk gets worse while calls become right: by the mean loss the state would be taken for a worse one."""
    before, after = ([(talk, None)] * 2 + [(call, None)] * 18 for talk, call in ((2.4, 0.08), (3.6, 0.01)))
    assert Score.mean(after).loss > Score.mean(before).loss
    assert Score.mean(after).error < Score.mean(before).error
    assert Score.mean([(0.4, True), (0.9, False)]).error == pytest.approx(0.65), "of choices the loss itself"
    assert not math.isfinite(Score.mean([(0.4, None), (math.nan, None)]).error)
    assert not math.isfinite(Score.mean([(0.4, None), (math.inf, None)]).error)
