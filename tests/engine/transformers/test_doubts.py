"""Answers that the others speak against, where the weights learn that serve."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from agentd.adapt.passes import first_order
from agentd.engine.operations import Descend, Encode, Loss, ScoreExamples, SetRule, Use
from agentd.engine.protocol import BASE, AdapterSpec, LearningRule
from agentd.engine.session import Session
from agentd.engine.transformers import background as backgrounds
from agentd.engine.transformers.background import TransformersBackground
from agentd.learn.label_noise import Doubt, LabelNoise
from agentd.learn.objectives import log_likelihood
from tests.golden.samples import LocalEngine

PLACES, DEEDS = ("kitchen", "garden", "attic", "hall"), ("on", "off")
N, N_DEV, WRONG, STEPS = 64, 8, 12, 100
LORA = LearningRule(adapters=AdapterSpec("lora", 8, 16.0, 0, differentiated=True))
SURE = Doubt(0.999999, 0.0)  # that it is wrong


class Commands:
    """What was to be done and was said to be, in a session; `wrong` have the answer to another command."""

    def __init__(self, background: TransformersBackground, folder: Path) -> None:
        chance = random.Random(0)
        rows = [(chance.choice(DEEDS), chance.choice(PLACES)) for _ in range(N + N_DEV)]
        self.wrong = set(chance.sample(range(N), WRONG))
        lines = []
        for i, row in enumerate(rows):
            done, place = chance.choice([each for each in rows if each != row]) if i in self.wrong else row
            messages = [{"role": "user", "content": f"{row[0]} the {row[1]}"}]
            lines.append({"input": {"messages": messages}, "choices": [], "target": f"{done}: {place}"})
        self.session = Session(background)
        self.engine: Any = LocalEngine(self.session)
        source = folder / "commands.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.engine.run(Encode(source, folder / "encoded.jsonl"))
        self.engine.run(Use(BASE))
        self.engine.run(SetRule(LORA))

    def likelihoods(self, numbers: list[int]) -> list[float]:
        scores = self.engine.run(ScoreExamples(numbers))
        return [
            log_likelihood(self.session._examples[n], s.choices, s.target) for n, s in zip(numbers, scores, strict=True)
        ]


@pytest.fixture
def commands(background: TransformersBackground, tmp_path: Path) -> Commands:
    return Commands(background, tmp_path)


def test_each_example_is_weighed_by_its_own_doubt(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that was asked for, whatever is put together: who is surely wrong moves nothing."""
    numbers, doubted = [9, 2, 30, 5, 17, 41], [30, 2]
    others = [number for number in numbers if number not in doubted]
    doubts = [SURE if number in doubted else None for number in numbers]
    run = commands.engine.run
    before = commands.likelihoods(numbers)
    found = run(Descend(numbers, 0.1, 1, 0.0, 1e-3, doubts))
    assert found.log_likelihoods == pytest.approx(before, rel=0.02)
    with_doubts = commands.likelihoods(numbers)
    run(SetRule(LORA))
    run(Descend(others, 0.1, 1, 0.0, 1e-3))
    without = commands.likelihoods(numbers)
    run(SetRule(LORA))
    run(Descend(numbers, 0.1, 1, 0.0, 1e-3))
    plain = commands.likelihoods(numbers)

    def apart(one: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(one, without, strict=True))

    assert apart(with_doubts) < 0.1 * apart(plain)
    monkeypatch.setattr(backgrounds, "LOSS_TOKENS", 96)
    assert run(Loss(numbers, 0.1, doubts=doubts)) < run(Loss(numbers, 0.1))


def test_wrong_answers_are_found(commands: Commands, dtype: str, tmp_path: Path) -> None:
    """And nothing else is."""
    if dtype != "float32":
        pytest.skip("what is weighed is no different")
    train, dev = list(range(N)), list(range(N, N + N_DEV))
    encoded = dict(enumerate(commands.session._examples))
    noise = LabelNoise(encoded, dict.fromkeys(train, 1), dict.fromkeys(dev, 1))
    run = first_order.run(
        commands.engine,
        train=train,
        dev=dev,
        steps=STEPS,
        nll_weight=0.1,
        seed=0,
        lr=1e-2,
        epsilon=None,
        moved=tmp_path / "moved",
        noise=noise,
        on_step=lambda _: None,
    )
    asyncio.run(run)
    found = set(noise.doubted)
    assert len(found & commands.wrong) >= 0.7 * WRONG, (sorted(found), sorted(commands.wrong))
    assert len(found - commands.wrong) <= N / 20, (sorted(found), sorted(commands.wrong))
