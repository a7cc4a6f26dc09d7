"""Skills: the probes as they are written, and when a group of them counts as lost."""

import math
import random
from collections import Counter

import pytest

from agentd.adapt.gate import gate, skills
from agentd.adapt.gate.gate import Outcome
from agentd.adapt.gate.skills import Skill
from agentd.config.schema import GateSettings

N = len(skills.probes())
GROUPS = Counter(probe.group for probe in skills.probes())


def test_there_are_enough_probes_in_nine_groups() -> None:
    assert 150 <= N <= 200
    assert len(GROUPS) == 9
    assert min(GROUPS.values()) >= 16
    assert {"arithmetic", "json", "safety", "second language"} < GROUPS.keys()
    assert any(probe.chat for probe in skills.probes())


@pytest.mark.parametrize("probe", skills.probes(), ids=lambda probe: f"{probe.group}: {probe.prompt[-30:]}")
def test_a_probe_has_one_right_answer_among_others_like_it(probe: skills.Probe) -> None:
    assert probe.prompt
    assert 2 <= len(probe.answers) <= 4
    assert len(set(probe.answers)) == len(probe.answers)
    for one in probe.answers:
        assert one
        assert not any(one != other and other.startswith(one) for other in probe.answers), "told apart by their ends"
    longest, shortest = max(map(len, probe.answers)), min(map(len, probe.answers))
    assert longest - shortest <= max(6, shortest), "what is longer is less likely whatever it says"


def test_no_probe_is_there_twice() -> None:
    assert len({probe.prompt for probe in skills.probes()}) > 0.99 * N


def test_a_score_is_the_probability_of_the_right_one_among_its_own() -> None:
    assert skills.score([-3.0, -3.0]) == pytest.approx(0.5)
    assert skills.score([-1.0, -1.0 - math.log(3)]) == pytest.approx(0.75)
    # What moves all continuations alike is no loss of a skill.
    assert skills.score([-11.0, -11.0 - math.log(3)]) == pytest.approx(0.75)
    assert skills.score([-1.0, -1000.0]) == 1.0
    assert skills.score([-1000.0, -1.0]) == 0.0
    assert skills.score([math.nan, -1.0]) == skills.score([-1.0, -math.inf]) == 0.0


def model(seed: int, noise: float = 0.0, fall: float = 0.0, group: str = "json") -> list[list[float]]:
    """Log-likelihoods of all probes: margins of one model, moved by noise and, in one group, to the worse."""
    own, moved = random.Random(0), random.Random(seed)
    margins = [own.gauss(1.0, 1.5) + moved.gauss(0.0, noise) for _ in range(N)]
    margins = [m - fall * (probe.group == group) for m, probe in zip(margins, skills.probes(), strict=True)]
    return [[-5.0 + margin, -5.0] for margin in margins]


def lost(candidate: list[list[float]]) -> list[str]:
    return skills.lost(skills.compare(model(0), candidate, seed=1), 0.05, 0.05)


def test_the_same_model_loses_nothing() -> None:
    compared = skills.compare(model(0), model(0), seed=1)
    assert compared.keys() == GROUPS.keys()
    assert all(skill.loss == 0.0 and skill.n == GROUPS[group] for group, skill in compared.items())
    assert lost(model(0)) == []


def test_noise_turns_no_good_candidate_down() -> None:
    """Margins that move by as much as a nat, up and down, make some group 5 % worse for most candidates."""
    candidates = [skills.compare(model(0), model(seed, noise=1.0), seed) for seed in range(1, 41)]
    worse = [any(skill.loss > 0.05 for skill in compared.values()) for compared in candidates]
    down = [bool(skills.lost(compared, 0.05, 0.05)) for compared in candidates]
    assert sum(worse) > 20
    assert sum(down) <= 4


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_a_skill_that_is_lost_is_seen_in_noise(noise: float) -> None:
    assert all("json" in lost(model(seed, noise, fall=2.5)) for seed in range(1, 6))


def test_a_loss_within_the_allowance_is_none() -> None:
    fallen = skills.compare(model(0), model(0, fall=0.1), seed=1)["json"]
    assert 0 < fallen.loss < 0.05
    assert fallen.p < 0.001, "it is no chance, and it is small"
    assert lost(model(0, fall=0.1)) == []


def test_a_candidate_that_gains_on_its_task_and_loses_a_skill_is_turned_down() -> None:
    before, after = ({"t": Outcome([loss] * 40, [hit] * 40)} for loss, hit in ((2.0, False), (0.1, True)))

    def judged(skill: Skill, max_skill_loss: float = 0.05) -> gate.Verdict:
        settings = GateSettings(max_skill_loss=max_skill_loss)
        return gate.judge(before, after, adapted={"t"}, drift=0.1, gate=settings, seed=0, skills={"json": skill})

    fallen = Skill(20, 0.8, 0.6, 0.001)
    verdict = judged(fallen)
    assert not verdict.accepted
    assert "json 0.800 → 0.600" in verdict.reason
    assert "gate.max_skill_loss is 0.05" in verdict.reason
    assert verdict.as_json()["skills"] == {"json": {"n": 20, "before": 0.8, "after": 0.6, "p": 0.001}}
    assert judged(fallen, max_skill_loss=0.3).accepted
    assert judged(Skill(20, 0.8, 0.78, 0.001)).accepted
    assert judged(Skill(20, 0.8, 0.6, 0.2)).accepted
