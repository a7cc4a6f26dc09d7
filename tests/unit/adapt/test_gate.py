import math
import random
from typing import Any

import pytest

from agentd.adapt.gate.gate import NoCall, Outcome, Verdict, is_near_tie, judge
from agentd.config.schema import GateSettings
from agentd.engine.protocol import Scores

N = 120


def outcome(accuracy: float, loss: float, seed: int = 0, n: int = N) -> Outcome:
    """`n` made-up results around `loss`; the first ones are hits."""
    noise = random.Random(seed)
    return Outcome([loss + noise.gauss(0, 0.3) for _ in range(n)], [i < accuracy * n for i in range(n)])


def text(loss: float, seed: int = 0, n: int = N) -> Outcome:
    return Outcome(outcome(0, loss, seed, n).losses, [])


def test_a_clear_gain_is_taken_and_told() -> None:
    before, after = {"t": outcome(0.55, 0.9, 1)}, {"t": outcome(0.85, 0.4, 2)}
    verdict = judge(before, after, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0)
    assert verdict.accepted
    assert "0.550 → 0.850" in verdict.reason
    assert verdict.tasks["t"]["p_accuracy"] < 0.001
    assert verdict.as_json()["drift"] == 0.1


def test_the_same_model_again_is_no_gain() -> None:
    same = {"t": outcome(0.55, 0.9)}
    verdict = judge(same, same, adapted={"t"}, drift=0.0, gate=GateSettings(), seed=0)
    assert not verdict.accepted
    assert "no task improved" in verdict.reason


@pytest.mark.slow
def test_noise_passes_no_more_often_than_alpha_says() -> None:
    """Candidates that are as good as what serves: at a level of 5 % about one in twenty may slip through."""
    gate, rng, n_accepted = GateSettings(alpha=0.05, max_regression=1.0), random.Random(3), 0
    for trial in range(300):
        base = [rng.random() for _ in range(60)]
        before = Outcome([x + rng.gauss(0, 0.3) for x in base], [rng.random() < 0.6 for _ in base])
        after = Outcome([x + rng.gauss(0, 0.3) for x in base], [rng.random() < 0.6 for _ in base])
        n_accepted += judge({"t": before}, {"t": after}, adapted={"t"}, drift=0.0, gate=gate, seed=trial).accepted
    assert n_accepted <= 25  # expected at most 15, standard deviation 3.8


def test_a_gain_on_one_task_does_not_buy_a_loss_on_another() -> None:
    before = {"new": outcome(0.5, 1.0, 1), "old": outcome(0.9, 0.3, 2)}
    after = {"new": outcome(0.9, 0.3, 3), "old": outcome(0.8, 0.5, 4)}
    verdict = judge(before, after, adapted={"new"}, drift=0.1, gate=GateSettings(), seed=0)
    assert not verdict.accepted
    assert "lost on old" in verdict.reason


def test_one_example_is_not_a_regression() -> None:
    """With 20 held-out examples one of them is five points, more than max_regression."""
    old = Outcome([0.5] * 20, [True] * 15 + [False] * 5)
    new = Outcome([0.5] * 20, [True] * 14 + [False] * 6)
    before, after = {"a": outcome(0.5, 1.0, 1), "b": old}, {"a": outcome(0.9, 0.3, 2), "b": new}
    assert judge(before, after, adapted={"a"}, drift=0.1, gate=GateSettings(), seed=0).accepted


def test_better_losses_with_worse_answers_are_not_taken() -> None:
    before, after = {"t": outcome(0.60, 1.5, 1)}, {"t": outcome(0.59, 0.5, 2)}
    assert not judge(before, after, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0).accepted


def test_free_text_is_judged_by_its_loss() -> None:
    better = judge({"t": text(2.0, 1)}, {"t": text(1.5, 2)}, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0)
    worse = judge({"t": text(2.0, 1)}, {"t": text(2.5, 2)}, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0)
    assert better.accepted
    assert better.tasks["t"]["before"]["accuracy"] is None
    assert "lost on t" in worse.reason


def test_drift_beyond_the_cap_is_refused() -> None:
    before, after = {"t": outcome(0.5, 1.0, 1)}, {"t": outcome(0.9, 0.3, 2)}
    verdict = judge(before, after, adapted={"t"}, drift=0.51, gate=GateSettings(max_drift=0.5), seed=0)
    assert not verdict.accepted
    assert "0.510 nats" in verdict.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "drift"])
def test_what_is_not_finite_is_refused(bad: float, where: str) -> None:
    after = outcome(0.9, 0.3, 2)
    if where == "loss":
        after.losses[7] = bad
    drift = bad if where == "drift" else 0.1
    verdict = judge({"t": outcome(0.5, 1.0, 1)}, {"t": after}, adapted={"t"}, drift=drift, gate=GateSettings(), seed=0)
    assert not verdict.accepted
    assert "not finite" in verdict.reason
    assert verdict.drift is None


def test_new_holdout_cannot_outvote_what_earlier_revisions_were_judged_by() -> None:
    """Flipped labels come with flipped holdout: here 200 of it, against 60 that judged before."""
    old = [False] * 200 + [True] * 60
    before = Outcome([1.5] * 200 + [0.3] * 60, [False] * 200 + [True] * 50 + [False] * 10, old)
    after = Outcome([0.3] * 200 + [1.5] * 60, [True] * 200 + [True] * 20 + [False] * 40, old)
    verdict = judge({"t": before}, {"t": after}, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0)
    assert not verdict.accepted
    assert "earlier revisions were judged by" in verdict.reason
    assert verdict.tasks["t"]["established"]["n"] == 60
    forgotten = Outcome(after.losses, after.hits)
    assert (
        judge({"t": before}, {"t": forgotten}, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0).accepted is False
    )
    unknown = {"t": Outcome(before.losses, before.hits)}
    assert judge(unknown, {"t": forgotten}, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0).accepted


def test_free_text_is_judged_on_established_holdout_too() -> None:
    old = [False] * 80 + [True] * 40
    before, after = Outcome([2.0] * 120, [], old), Outcome([0.5] * 80 + [2.5] * 40, [], old)
    verdict = judge({"t": before}, {"t": after}, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0)
    assert not verdict.accepted
    assert "earlier revisions" in verdict.reason


def test_confidence_lost_on_established_holdout_counts_before_answers_are() -> None:
    """Flipped labels move every probability there the wrong way, long before many answers change."""
    known = [True] * 40 + [False] * 40
    base = outcome(0.5, 0.8, 1, 80).losses
    before = Outcome(base, [i % 2 == 0 for i in range(80)], known)
    better_anew = [loss - 0.3 for loss in base[40:]]
    hits = [*before.hits[:40], *[True] * 40]

    def verdict(shift: float) -> Verdict:
        noise = random.Random(2)
        after = [loss + shift + noise.gauss(0, 0.05) for loss in base[:40]] + better_anew
        candidate = {"t": Outcome(after, hits, known)}
        return judge({"t": before}, candidate, adapted={"t"}, drift=0.0, gate=GateSettings(), seed=0)

    worse = verdict(0.06)
    assert not worse.accepted
    assert "earlier revisions were judged by" in worse.reason
    assert worse.tasks["t"]["established"]["p_worse"] < 0.05
    assert verdict(-0.06).accepted


@pytest.mark.slow
def test_an_honest_pass_on_another_kind_of_input_is_mostly_taken() -> None:
    """It helps there and changes nothing but noise on what was established: at most one in four is held for a
    contradiction."""
    n_accepted, known = 0, [True] * 40 + [False] * 40
    for trial in range(40):
        noise = random.Random(trial)
        base = [max(0.0, 0.8 + noise.gauss(0, 0.3)) for _ in known]
        after = [x + noise.gauss(0, 0.1) - 0.4 * (not old) for x, old in zip(base, known, strict=True)]
        hits = [noise.random() < 0.6 for _ in known]
        better = hits[:40] + [True] * 40
        before, candidate = Outcome(base, hits, known), Outcome(after, better, known)
        n_accepted += judge(
            {"t": before}, {"t": candidate}, adapted={"t"}, drift=0.0, gate=GateSettings(), seed=trial
        ).accepted
    assert 22 <= n_accepted < 40  # 30 expected, standard deviation 2.7


def generated(right: int, n: int = 60, loss: float = 1.0, seed: int = 0) -> Outcome:
    noise = random.Random(seed)
    hits = [i < right for i in range(n)]
    return Outcome(
        [loss + noise.gauss(0, 0.05) for _ in range(n)], hits, metric="call", shares=[float(h) for h in hits]
    )


def judged(before: Outcome, after: Outcome, **more: Any) -> Verdict:
    return judge({"t": before}, {"t": after}, adapted={"t"}, drift=0.1, gate=GateSettings(), seed=0, **more)


def test_generated_answers_that_get_better_are_taken() -> None:
    verdict = judged(generated(3), generated(20, seed=1))
    assert verdict.accepted
    assert (verdict.tasks["t"]["metric"], verdict.tasks["t"]["answered"]) == ("call", 60)


def test_a_loss_that_falls_while_answers_stay_wrong_is_no_gain() -> None:
    verdict = judged(generated(0, loss=3.7), generated(0, loss=0.2, seed=1))
    assert not verdict.accepted
    assert verdict.tasks["t"]["p_loss"] < 0.001
    assert "the answers did not get better" in verdict.reason


def test_a_loss_helps_out_where_answers_are_few_and_say_the_same() -> None:
    few = {"n": 20}
    assert judged(generated(2, **few, loss=2.0), generated(5, **few, loss=0.5, seed=1)).accepted
    assert not judged(generated(2, **few), generated(5, **few, loss=1.0)).accepted
    assert not judged(generated(2, **few, loss=2.0), generated(3, **few, loss=0.5, seed=1)).accepted


def test_unanswered_holdout_is_neither_right_nor_wrong() -> None:
    before, after = generated(3, n=80), generated(20, n=80, seed=1)
    hide = [None] * 40
    partly = [Outcome(o.losses, [*o.hits[:40], *hide], metric="call") for o in (before, after)]
    assert judged(*partly).tasks["t"]["after"]["accuracy"] == 0.5
    nothing = [Outcome(o.losses, [*hide, *hide], metric="call") for o in (before, after)]
    assert not judged(*nothing).accepted


@pytest.mark.parametrize(
    ("n", "before", "after", "accepted"),
    [
        (12, 0, 1, True),  # one message is none
        (30, 0, 3, False),
        (12, 0, 2, False),
        (120, 0, 2, True),
        (120, 0, 3, False),
        (32, 2, 6, False),
        (32, 9, 2, True),
    ],
)
def test_calls_where_none_is_wanted(n: int, before: int, after: int, accepted: bool) -> None:
    calls = NoCall("small talk", [i < before for i in range(n)], [i < after for i in range(n)])
    verdict = judged(generated(3), generated(30, seed=1), no_calls={"t": calls})
    assert verdict.accepted == accepted
    figures = verdict.tasks["t"]["no_call"]
    assert (figures["source"], figures["n"]) == ("small talk", n)
    assert (figures["before"], figures["after"]) == (before / n, after / n)
    if not accepted:
        assert "calls tools where none is wanted" in verdict.reason


def test_calls_for_other_messages_than_before_are_no_rise() -> None:
    """A model that calls for a fifth of all talk anyway does so for another fifth."""
    before, after = [[i % 5 == part for i in range(100)] for part in (0, 1)]
    after[-2:] = [True, True]
    assert judged(generated(3), generated(30, seed=1), no_calls={"t": NoCall("small talk", before, after)}).accepted


def test_a_few_confident_tokens_do_not_rule_the_loss() -> None:
    """Three of sixty texts lose twenty nats a token, the others get a little worse: the mean falls."""
    before = Outcome([20.0] * 3 + [1.0 + i / 1000 for i in range(57)], [])
    after = Outcome([1.0] * 3 + [1.02 + i / 1000 for i in range(57)], [])
    assert after.loss < before.loss
    assert not judged(before, after).accepted


def test_figures_hold_no_user_s_words() -> None:
    verdict = judged(generated(3), generated(20, seed=1))
    verdict.tasks["t"]["answers"] = [{"input": "my secret"}]
    assert "secret" in str(verdict.as_json())
    assert "secret" not in str(verdict.figures)
    assert verdict.figures["t"]["n"] == 60


def test_near_ties_are_those_of_the_two_best() -> None:
    """What is served does not follow from scores that differ by no more than a layout moves them."""
    assert is_near_tie(Scores([-9.0, -3.0, -4.4], []))
    assert not is_near_tie(Scores([-9.0, -3.0, -4.6], []))
    assert not is_near_tie(Scores([math.nan, -3.0], []))
    assert not is_near_tie(Scores([], [-1.0]))
