from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentd.budget.calibration import Factor, family
from agentd.budget.expectation import (
    ZO_STEPS,
    Expected,
    PastPass,
    Speed,
    in_place_steps,
    judging_seconds,
    prior_gain,
    row_cost,
    seconds_for,
)
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.plan import PlanSpace
from agentd.budget.planner import choose, consider
from agentd.budget.recipe import recipe
from agentd.budget.workload import Workload
from agentd.errors import PassRefused
from agentd.formats.gguf_header import read_header
from agentd.methods import OF_ENGINE

MB = 10**6
WORK = Workload(seq_len=60, tokens=20_000, examples=512, prefix=31)


@pytest.fixture(scope="module")
def arch(real_model: Path) -> ModelShapes:
    return ModelShapes.from_header(read_header(real_model))


def test_the_whole_dial_is_looked_at(arch: ModelShapes) -> None:
    settings = [(plan.method, plan.blocks, plan.checkpoint, plan.small) for plan in PlanSpace(arch, WORK).plans()]
    assert settings[0] == ("mezo", 0, False, False)
    assert sorted({blocks for _, blocks, *_ in settings}) == [0, 1, 2, 4, 8, 12, 16, 24, 30]
    assert {blocks for _, blocks, _, small in settings if small} == {1, 2, 4, 8, 12, 16, 24}
    assert len(settings) == len(set(settings)) == 46
    assert [(plan.method, plan.blocks) for plan in PlanSpace(arch, WORK).plans(bp=False)] == [("mezo", 0)]


def test_one_block_at_a_time_takes_the_memory_of_one(arch: ModelShapes) -> None:
    plans = {(p.method, p.blocks, p.checkpoint): p for p in PlanSpace(arch, WORK).plans()}
    one_at_a_time = {blocks for method, blocks, checkpoint in plans if checkpoint and method == "suffix-bp"}
    assert one_at_a_time == {2, 4, 8, 12, 16, 24, 30}
    assert plans["suffix-bp", 16, True].needed < 0.65 * plans["suffix-bp", 16, False].needed
    everywhere, last = plans["blockwise-bp", 30, True], plans["suffix-bp", 1, False]
    assert everywhere.needed_by("trainer") < 1.3 * last.needed_by("trainer")
    choice = choose(arch, WORK, available=16_000 * MB, reserve=0)
    assert not choice.plan.checkpoint  # it takes longer, and there is memory


def test_smaller_micro_batches_save_memory_and_take_longer(arch: ModelShapes) -> None:
    ask: dict[str, Any] = {"available": 16_000 * MB, "reserve": 0, "method": "suffix-bp", "blocks": 16}
    whole, small, one = choose(arch, WORK, **ask).considered
    assert [whole.plan.small, small.plan.small, one.plan.checkpoint] == [False, True, True]
    assert small.plan.setting == "suffix-bp with 16 blocks, small micro-batches"
    assert one.plan.needed < small.plan.needed < whole.plan.needed
    assert whole.expected.seconds < small.expected.seconds < one.expected.seconds
    assert choose(arch, WORK, **{**ask, "available": whole.plan.needed - 1}).plan == small.plan


def test_bfloat16_halves_the_blocks_weights(arch: ModelShapes) -> None:
    terms = [
        {t.name: t.bytes for t in PlanSpace(arch, WORK, bf16=bf16).plan("suffix-bp", 4).terms} for bf16 in (False, True)
    ]
    assert terms[0]["block weights"] == 2 * terms[1]["block weights"]


def test_plenty_of_memory_takes_the_preferred_plan(arch: ModelShapes) -> None:
    choice = choose(arch, WORK, available=16_000 * MB, reserve=256 * MB)
    assert (choice.plan.method, choice.plan.blocks) == ("suffix-bp", 16)
    assert choice.budget == 16_000 * MB - 256 * MB
    assert choice.considered[0].plan == choice.plan
    assert all(each.fits for each in choice.considered)


@pytest.mark.slow
def test_less_memory_turns_the_dial_down(arch: ModelShapes) -> None:
    """Going down step by step, what is expected falls from the preferred plan to one block, MeZO, and a refusal."""
    dial: list[tuple[str, int, bool]] = []
    scores: list[float] = []
    for available in range(2_000 * MB, 0, -2 * MB):
        try:
            choice = choose(arch, WORK, available=available, reserve=50 * MB)
        except PassRefused:
            break
        assert choice.plan.needed <= available - 50 * MB
        setting = (choice.plan.method, choice.plan.blocks, choice.plan.checkpoint)
        if not dial or dial[-1] != setting:
            dial.append(setting)
            scores.append(next(each.expected.score for each in choice.considered if each.plan == choice.plan))
    assert dial[0] == ("suffix-bp", 16, False)
    assert any(checkpoint for *_, checkpoint in dial)
    assert dial[-2:] == [("suffix-bp", 1, False), ("mezo", 0, False)]
    assert scores == sorted(scores, reverse=True)
    assert len(dial) >= 6


def test_memory_limit_and_reserve_bound_the_budget(arch: ModelShapes) -> None:
    free = choose(arch, WORK, available=4_000 * MB, reserve=0)
    assert free.plan.needed > 300 * MB
    assert choose(arch, WORK, available=4_000 * MB, reserve=0, limit=300 * MB).plan.method == "mezo"
    assert choose(arch, WORK, available=4_000 * MB, reserve=3_700 * MB).plan.method == "mezo"


@pytest.mark.parametrize(
    ("method", "blocks", "expected"),
    [
        ("mezo", "auto", ("mezo", 0)),
        ("suffix-bp", 1, ("suffix-bp", 1)),
        ("suffix-bp", 3, ("suffix-bp", 3)),
        ("elasticzo", 30, ("elasticzo", 30)),
        ("elasticzo", 0, ("mezo", 0)),
        ("auto", 0, ("mezo", 0)),
        ("auto", 2, ("suffix-bp", 2)),
        ("auto", "2", ("suffix-bp", 2)),
        ("blockwise-bp", "auto", ("blockwise-bp", 30)),
        ("blockwise-bp", 7, ("blockwise-bp", 7)),
    ],
)
def test_wishes_are_respected(arch: ModelShapes, method: str, blocks: int | str, expected: tuple[str, int]) -> None:
    plan = choose(arch, WORK, available=16_000 * MB, reserve=0, method=method, blocks=blocks).plan
    assert (plan.method, plan.blocks) == expected


def test_a_wish_that_does_not_fit_is_refused_not_bent(arch: ModelShapes) -> None:
    plan = min(PlanSpace(arch, WORK).variants("suffix-bp", 4), key=lambda plan: plan.needed)
    with pytest.raises(PassRefused) as refusal:
        choose(arch, WORK, available=plan.needed + 9 * MB, reserve=10 * MB, method="suffix-bp", blocks=4)
    assert refusal.value.shortfall == MB
    enough = plan.needed + 10 * MB
    assert choose(arch, WORK, available=enough, reserve=10 * MB, method="suffix-bp", blocks=4).plan == plan


def test_a_refusal_says_what_was_needed_what_there_was_and_what_to_reduce(arch: ModelShapes) -> None:
    mezo = PlanSpace(arch, WORK).plan("mezo", 0)
    with pytest.raises(PassRefused) as refusal:
        choose(arch, WORK, available=60 * MB, reserve=50 * MB, limit=40 * MB)
    assert refusal.value.shortfall == mezo.needed - 10 * MB
    message = str(refusal.value)
    assert f"(mezo) needs {mezo.needed / 1e6:.1f} MB" in message
    assert "60.0 MB are available" in message
    assert "keeps 50.0 MB" in message
    assert "memory.limit allows 40.0 MB" in message
    assert f"({refusal.value.shortfall} bytes) short" in message
    assert "can be reduced is compute buffer" in message
    assert "shorter answers" in message


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"method": "sgd"}, "no method 'sgd'"),
        ({"blocks": 31}, "the model has 30"),
        ({"blocks": -1}, "the model has 30"),
        ({"method": "mezo", "blocks": 2}, "use elasticzo"),
        ({"method": "suffix-bp", "blocks": 0}, "train nothing"),
        ({"method": "suffix-bp", "bp": False}, "cannot build this architecture"),
        ({"blocks": 2, "bp": False, "no_bp_reason": "it is a Mamba"}, "it is a Mamba"),
    ],
)
def test_wishes_that_cannot_be_met(arch: ModelShapes, wish: dict[str, object], message: str) -> None:
    ask: Callable[..., object] = choose
    with pytest.raises(PassRefused, match=message) as refusal:
        ask(arch, WORK, available=16_000 * MB, reserve=0, **wish)
    assert refusal.value.shortfall == 0


def test_a_plan_accounts_for_every_byte(arch: ModelShapes) -> None:
    plan = PlanSpace(arch, WORK).plan("elasticzo", 4)
    parts = [plan.needed_by(process) for process in ("daemon", "engine", "trainer", "together")]
    assert plan.needed == sum(plan.predicted.values()) == sum(parts)
    assert all(parts)
    assert len(plan.predicted) == len(plan.terms)
    assert all(term.formula and (term.bytes >= 0 or term.process == "together") for term in plan.terms)
    tree = choose(arch, WORK, available=4_000 * MB, reserve=0).as_json()
    assert tree["needed_bytes"] == sum(term["bytes"] for term in tree["terms"])
    assert {"method", "blocks", "needed_bytes", "shortfall_bytes", "expected_gain", "seconds"} <= set(
        tree["considered"][0]
    )


def test_engine_and_trainer_take_turns(arch: ModelShapes) -> None:
    """What a pass needs is the larger of two moments: the trainer beside an idle context, the engine scoring alone."""
    small = PlanSpace(arch, WORK, runtime={"trainer": 10 * MB})
    for plan in (PlanSpace(arch, WORK).plan("suffix-bp", 4), small.plan("suffix-bp", 1)):
        sizes = plan.predicted
        idle = sizes["engine: runtime"] + sizes["engine: background KV cache"]
        beside = plan.needed_by("daemon") + plan.needed_by("trainer") + idle
        alone = plan.needed_by("daemon") + plan.needed_by("engine")
        assert plan.needed == max(beside, alone)
    tapped = PlanSpace(arch, WORK).plan("blockwise-bp", 30)  # there the engine works in every step, the trainer waiting
    scores = sum(tapped.predicted[f"engine: {name}"] for name in ("logits", "compute buffer"))
    parts = sum(tapped.needed_by(process) for process in ("daemon", "engine", "trainer"))
    assert tapped.needed == parts - scores


def test_measured_fixed_costs_replace_the_constants(arch: ModelShapes) -> None:
    usual, measured = (
        PlanSpace(arch, WORK, runtime=runtime).plan("suffix-bp", 1)
        for runtime in (None, {"trainer": 100 * MB, "engine": MB})
    )
    assert measured.predicted["trainer: runtime"] == 100 * MB
    assert measured.predicted["engine: runtime"] == MB
    assert measured.needed < usual.needed


def test_calibration_moves_the_prediction_visibly(arch: ModelShapes) -> None:
    name = family("elasticzo", 4)
    factors = {("trainer", name): Factor("trainer", name, 1.2, 5), ("engine", name): Factor("engine", name, 0.9, 5)}
    plain, moved = (
        PlanSpace(arch, WORK, calibration=calibration).plan("elasticzo", 4) for calibration in (None, factors)
    )
    assert moved.needed_by("trainer") == pytest.approx(1.2 * plain.needed_by("trainer"), abs=1)
    assert moved.needed_by("engine") == pytest.approx(0.9 * plain.needed_by("engine"), abs=1)
    assert moved.needed_by("daemon") == plain.needed_by("daemon")
    assert "5 earlier passes" in next(term.formula for term in moved.terms if term.name == "calibration")
    # Another family is not touched.
    assert PlanSpace(arch, WORK, calibration=factors).plan("mezo", 0) == PlanSpace(arch, WORK).plan("mezo", 0)


def test_the_choice_explains_itself(arch: ModelShapes) -> None:
    roomy = choose(arch, WORK, available=16_000 * MB, reserve=0)
    assert roomy.why.startswith("suffix-bp with 16 blocks needs ")
    assert "no pass has ended here yet" in roomy.why
    assert "Next best of what fits" in roomy.why
    tight = choose(arch, WORK, available=roomy.plan.needed - MB, reserve=0)
    assert "suffix-bp with 16 blocks would be better and is 1.0 MB short" in tight.why
    assert choose(arch, WORK, available=16_000 * MB, reserve=0, method="mezo").why.endswith("no other was looked at.")
    assert roomy.as_json()["why"] == roomy.why


def test_a_slow_device_takes_less_work(arch: ModelShapes) -> None:
    """Where many blocks would take much of the time in which their gain counts, fewer are better."""
    ask: dict[str, Any] = {"available": 16_000 * MB, "reserve": 0}
    quick, slow = choose(arch, WORK, **ask), choose(arch, WORK, **ask, speed=Speed(forward=30.0, backward=10.0))
    assert slow.plan.blocks < quick.plan.blocks
    seconds = {each.plan.setting: each.expected.seconds for each in quick.considered}
    for each in slow.considered:
        assert each.expected.seconds > seconds[each.plan.setting]


def test_what_earlier_passes_gained_turns_the_dial(arch: ModelShapes) -> None:
    ask: dict[str, Any] = {"available": 16_000 * MB, "reserve": 0}
    good, bad = PastPass("suffix-bp", 1, 0.35, 90.0), PastPass("suffix-bp", 2, 0.02, 300.0)
    choice = choose(arch, WORK, **ask, history=[good, bad] * 4)
    gain = {(each.plan.method, each.plan.blocks): each.expected.gain for each in choice.considered}
    assert gain["suffix-bp", 1] > gain["suffix-bp", 2]  # the prior says the opposite
    assert choice.plan.blocks != 2
    assert "8 earlier passes" in choice.why
    # One pass alone moves the expectation, and does not overturn the prior.
    gains = [
        next(e.expected.gain for e in choose(arch, WORK, **ask, history=h).considered if e.plan.blocks == 2)
        for h in ([], [bad])
    ]
    assert 0 < gains[1] < gains[0]


def test_texts_take_more_blocks_than_choices(arch: ModelShapes) -> None:
    """What they say comes from blocks further down; an earlier pass on choices tells nothing of it."""
    texts = replace(WORK, texts=True)
    for available in (700 * MB, 16_000 * MB):
        ask: dict[str, Any] = {"available": available, "reserve": 0}
        few, many = choose(arch, WORK, **ask).plan.blocks, choose(arch, texts, **ask).plan.blocks
        assert many >= max(few, arch.n_layer // 2), available
    shallow = [PastPass("suffix-bp", 2, 0.5, 100.0)] * 4
    ask = {"available": 16_000 * MB, "reserve": 0}

    def gains(history: list[PastPass]) -> dict[str, float]:
        considered = choose(arch, texts, **ask, history=history).considered
        return {each.plan.setting: each.expected.gain for each in considered}

    assert gains(shallow) == gains([])
    assert gains([replace(past, texts=True) for past in shallow]) != gains([])


def test_on_the_weights_themselves_texts_keep_the_order_of_methods() -> None:
    every = [("lora", 30), ("bp", 30), ("loho", 30), ("mezo", 0), ("adazeta", 0)]
    gains = [prior_gain(method, blocks, texts=True, n_layer=30) for method, blocks in every]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > gains[1]


def test_seconds_of_earlier_passes_set_the_pace(arch: ModelShapes) -> None:
    ask: dict[str, Any] = {"available": 16_000 * MB, "reserve": 0}

    def expected(**knowledge: Any) -> Expected:
        considered = choose(arch, WORK, **ask, **knowledge).considered
        return next(each.expected for each in considered if each.plan.setting == "elasticzo with 4 blocks")

    first = expected()
    again = expected(history=[PastPass("elasticzo", 4, first.gain, 3 * first.seconds)] * 6)
    assert 1.5 * first.seconds < again.seconds < 3 * first.seconds


def test_more_work_needs_more_memory_and_time(arch: ModelShapes) -> None:
    longer = replace(WORK, seq_len=500, tokens=5 * WORK.tokens)
    for method, blocks in (("mezo", 0), ("suffix-bp", 1), ("elasticzo", 8)):
        assert PlanSpace(arch, longer).plan(method, blocks).needed > PlanSpace(arch, WORK).plan(method, blocks).needed


def test_a_trunk_that_is_run_once_costs_less_the_more_blocks_are_trained(arch: ModelShapes) -> None:
    """The tap ends where training begins: with all blocks trained there is no trunk left to run."""
    slow = Speed(forward=40.0, backward=1e9, trunk=1e9, load=1e15)
    considered = choose(arch, WORK, available=16_000 * MB, reserve=0, method="suffix-bp", speed=slow).considered
    by_blocks = {each.plan.blocks: each.expected.seconds for each in considered}
    assert by_blocks[30] < by_blocks[16] < by_blocks[8] < by_blocks[1]
    assert by_blocks[1] - by_blocks[30] == pytest.approx(
        29 / 30 * 0.8 * WORK.tokens / 40.0, rel=0.01
    )  # without the holdout


def test_a_step_in_more_and_smaller_pieces_takes_longer(arch: ModelShapes) -> None:
    seconds = [
        choose(arch, replace(WORK, micro_tokens=n), available=16_000 * MB, reserve=0, method="suffix-bp", blocks=16)
        .considered[0]
        .expected.seconds
        for n in (512, 256, 128)
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


def test_the_trainer_runs_the_trunk_where_it_multiplies_bfloat16(arch: ModelShapes) -> None:
    ask: dict[str, Any] = {"available": 16_000 * MB, "reserve": 0}
    by_setting = {
        bf16: {each.plan.setting: each for each in choose(arch, WORK, **ask, bf16=bf16).considered}
        for bf16 in (False, True)
    }
    assert not any(each.plan.computes_trunk for each in by_setting[False].values())
    there = [each for each in by_setting[True].values() if each.plan.computes_trunk]
    assert {each.plan.method for each in there} == {"suffix-bp", "elasticzo"}
    for each in there:
        other = by_setting[False][each.plan.setting]
        trained = each.plan.blocks == arch.n_layer  # there is no trunk
        assert trained or each.expected.seconds < other.expected.seconds
        assert each.plan.as_json()["computes_trunk"]


IN_PLACE: dict[str, Any] = {"in_place": True, "bp": False}


def test_weights_that_learn_in_place_have_a_dial_of_their_own(arch: ModelShapes) -> None:
    plans = list(PlanSpace(arch.served(2), WORK, in_place=True).plans())
    settings = {(plan.method, plan.blocks): plan for plan in plans}
    assert len(settings) == len(plans)
    assert {method for method, _ in settings} == set(OF_ENGINE["transformers"])
    assert ("elasticzo", 30) not in settings  # there would be no trunk
    assert [settings["bp", k].checkpoint for k in (1, 2, 30)] == [False, True, True]
    needed = [settings["bp", k].needed for k in (1, 2, 4, 8, 16, 30)]
    assert needed == sorted(needed)
    assert settings["bp", 1].needed < settings["mezo", 0].needed < settings["elasticzo", 1].needed
    # Low-rank changes leave the weights alone: what serves is all that there is of them.
    for method in ("mezo-lora", "adazeta"):
        assert settings[method, 0].needed + 0.9 * arch.served(2).weight_bytes < settings["mezo", 0].needed
    assert settings["mezo-lora", 0].needed < settings["lora", 30].needed < settings["mezo", 0].needed


def test_in_place_less_memory_leaves_fewer_blocks(arch: ModelShapes) -> None:
    served = arch.served(2)
    plenty = choose(served, WORK, available=16_000 * MB, reserve=0, **IN_PLACE)
    assert plenty.plan.blocks > 0
    scarce = choose(served, WORK, available=plenty.plan.needed - 1, reserve=0, **IN_PLACE)
    assert scarce.plan.needed < plenty.plan.needed
    with pytest.raises(PassRefused) as refused:
        choose(served, WORK, available=10 * MB, reserve=0, **IN_PLACE)
    assert refused.value.shortfall > 0
    named = choose(served, WORK, available=16_000 * MB, reserve=0, method="elasticzo", blocks=2, **IN_PLACE)
    assert (named.plan.method, named.plan.blocks, len(named.considered)) == ("elasticzo", 2, 1)
    both = choose(served, WORK, available=16_000 * MB, reserve=0, blocks=2, **IN_PLACE)
    assert {each.plan.method for each in both.considered} == {"elasticzo", "loho", "bp"}


def test_steps_in_place_follow_the_examples_within_bounds() -> None:
    assert [in_place_steps("bp", 2, n) for n in (0, 100, 200, 10_000)] == [32, 32, 52, 160]
    assert in_place_steps("mezo", 0, 10_000) == ZO_STEPS["mezo"]


def test_answers_at_the_gate_take_time_within_what_it_has(arch: ModelShapes) -> None:
    setting = PastPass("mezo", 0, 0.0, 0.0)

    def seconds(tokens: int, allowed: float) -> float:
        work = replace(WORK, answer_tokens=tokens, answer_seconds=allowed)
        return seconds_for(work, Speed(answer=50.0), setting, arch)

    assert seconds(1000, 600) - seconds(0, 600) == pytest.approx(40)
    assert seconds(100_000, 600) - seconds(0, 600) == pytest.approx(600)


def test_the_time_of_training_goes_by_the_recipes_batches(arch: ModelShapes) -> None:
    calls = replace(WORK, prefix=500, tokens=640 * 30, examples=640, texts=True)
    setting = PastPass("suffix-bp", 16, 0.0, 0.0, micro_tokens=1024)
    seconds = [seconds_for(work, Speed(), setting, arch) for work in (calls, replace(calls, batch=8))]
    assert seconds[0] == seconds[1]


def test_no_plan_trains_blocks_that_compute_something_else(arch: ModelShapes) -> None:
    reason = "torch and the engine compute different things in block 1"

    def plans(**wish: Any) -> list[int]:
        every = consider(arch, WORK, budget=1 << 40, most_blocks=5, no_bp_reason=reason, **wish)
        return sorted({each.plan.blocks for each in every})

    assert plans() == [0, 1, 2, 4]
    assert plans(blocks=5) == [5]
    for wish in ({"blocks": 6}, {"method": "blockwise-bp"}):
        with pytest.raises(PassRefused, match=r"last 5 blocks.*block 1"):
            plans(**wish)


def test_many_labels_take_their_time_in_trainer_and_gate(arch: ModelShapes) -> None:
    """Every position that is scored goes through the vocabulary: by the trainer in every epoch, by the gate twice."""
    setting = PastPass("suffix-bp", 2, 0.0, 0.0, micro_tokens=384)

    def seconds(rows: int, **changes: Any) -> float:
        work = replace(WORK, rows=rows * WORK.examples, **changes)
        return seconds_for(work, Speed(), setting, arch)

    labels = seconds(200) - seconds(2)
    learned = WORK.examples * 4 // 5
    head = arch.n_vocab * arch.n_embd / arch.block_parameters[-1]
    assert labels > 4 * 198 * learned * 7 / 8 * head / Speed().backward  # 4 epochs of what is trained on
    judged = seconds(200, holdout_tokens=WORK.tokens // 2) - seconds(2, holdout_tokens=WORK.tokens // 2)
    assert judged > labels  # more holdout, more of it
    # However much there is: the gate has so much time for it.
    bounded = seconds(10_000, answer_seconds=10.0) - seconds(2, answer_seconds=10.0)
    assert bounded < seconds(10_000) - seconds(2)


def test_few_examples_train_to_the_last_epoch() -> None:
    """So few of them judge that they cannot end training before (trainer/loop.py)."""
    for n, share in ((120, 1.0), (1200, 0.5)):
        how = recipe("suffix-bp", 2, examples=n)
        assert how.usual == share * how.epochs


def test_the_trial_is_part_of_the_time(arch: ModelShapes) -> None:
    setting = PastPass("mezo", 0, 0.0, 0.0)
    short, long = (seconds_for(replace(WORK, trial_seconds=n), Speed(), setting, arch) for n in (1.0, 600.0))
    assert long - short == pytest.approx(599)


def test_passes_on_other_examples_tell_the_pace_by_what_was_promised_for_them(arch: ModelShapes) -> None:
    """Four passes on a tenth of the examples took what had been promised: nothing is wrong with the speed."""
    ask: dict[str, Any] = {"available": 16_000 * MB, "reserve": 0, "method": "suffix-bp", "blocks": 4}
    first = choose(arch, WORK, **ask).taken.expected
    small = replace(WORK, tokens=WORK.tokens // 10, examples=WORK.examples // 10)
    took = choose(arch, small, **ask).taken.expected
    assert took.computed == took.seconds < 0.7 * first.seconds
    past = PastPass("suffix-bp", 4, took.gain, took.seconds, computed=took.computed)
    again = choose(arch, WORK, **ask, history=[past] * 4).taken.expected
    assert again.seconds == pytest.approx(first.seconds)
    late = replace(past, seconds=2 * took.seconds)
    assert (
        1.4 * first.seconds < choose(arch, WORK, **ask, history=[late] * 4).taken.expected.seconds < 2 * first.seconds
    )


# Examples, tokens, scored rows, blocks, whether one is in memory at a time; and processor seconds of one thread in the
# frozen trunk, and in an epoch (an EPYC with avx512_bf16, 2026-11-30).
_TRAINED = [
    (40, 7527, 1040, 2, False, 18.4, 5.9),
    (64, 3255, 384, 16, False, 3.8, 12.2),
    (16, 4555, 1888, 8, False, 8.6, 11.0),
    (24, 3936, 624, 8, True, 7.5, 10.7),
]


@pytest.mark.parametrize(("n", "tokens", "rows", "k", "checkpoint", "trunk", "epoch"), _TRAINED)
def test_the_trainers_time_is_what_was_measured(
    arch: ModelShapes, n: int, tokens: int, rows: int, k: int, checkpoint: bool, trunk: float, epoch: float
) -> None:
    """Tasks of 2, 11 and 77 labels; what a block and the vocabulary alone took on that machine is known."""
    speed = Speed(forward=190.0, backward=6700.0, trunk=14800.0, load=1.7e9, start=0.0)
    work = Workload(seq_len=250, tokens=5 * tokens // 4, examples=5 * n // 4, prefix=30, rows=5 * rows // 4)
    plan = PlanSpace(arch, work, bf16=True).plan("suffix-bp", k, checkpoint)
    expected = seconds_for(work, speed, plan, arch) - judging_seconds(work, speed, row_cost(arch))
    measured = trunk + recipe("suffix-bp", k, examples=n).epochs * epoch
    assert measured / 1.5 < expected < 1.5 * measured
