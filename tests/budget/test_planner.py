from collections.abc import Callable
from pathlib import Path

import pytest

from agentd.budget import planner
from agentd.budget.footprint import Architecture, Workload
from agentd.budget.planner import Plan, choose, plan_for, plans
from agentd.errors import PassRefused
from agentd.gguf_header import read_header

MB = 10**6
WORK = Workload(seq_len=60, tokens=20_000, examples=512, prefix=31)


@pytest.fixture(scope="module")
def arch(model_path: Path) -> Architecture:
    return Architecture.from_header(read_header(model_path))


def test_the_whole_dial_is_looked_at(arch: Architecture) -> None:
    settings = [(plan.method, plan.blocks) for plan in plans(arch, WORK)]
    assert settings[0] == ("mezo", 0)
    assert sorted({blocks for _, blocks in settings}) == [0, 1, 2, 4, 8, 16, 30]
    assert len(settings) == len(set(settings)) == 13
    assert [(plan.method, plan.blocks) for plan in plans(arch, WORK, bp=False)] == [("mezo", 0)]


def test_plenty_of_memory_takes_the_preferred_plan(arch: Architecture) -> None:
    choice = choose(arch, WORK, available=16_000 * MB, reserve=256 * MB)
    assert choice.plan == max(plans(arch, WORK), key=planner.preference)
    assert choice.plan.method == "elasticzo"
    assert choice.budget == 16_000 * MB - 256 * MB


def test_less_memory_turns_the_dial_down(arch: Architecture) -> None:
    """Going down step by step, k falls from the preferred one to 1, then MeZO is left, then a refusal."""
    dial: list[tuple[str, int]] = []
    for available in range(2_000 * MB, 0, -2 * MB):
        try:
            choice = choose(arch, WORK, available=available, reserve=50 * MB)
        except PassRefused:
            break
        assert choice.plan.needed <= available - 50 * MB
        setting = (choice.plan.method, choice.plan.blocks)
        if not dial or dial[-1] != setting:
            dial.append(setting)
    assert dial[0] == ("elasticzo", 4)
    assert dial[-2:] == [("elasticzo", 1), ("mezo", 0)]
    blocks = [k for _, k in dial]
    assert blocks == sorted(blocks, reverse=True)


def test_memory_limit_and_reserve_bound_the_budget(arch: Architecture) -> None:
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
        ("auto", 2, ("elasticzo", 2)),
        ("auto", "2", ("elasticzo", 2)),
    ],
)
def test_wishes_are_respected(arch: Architecture, method: str, blocks: int | str, expected: tuple[str, int]) -> None:
    plan = choose(arch, WORK, available=16_000 * MB, reserve=0, method=method, blocks=blocks).plan
    assert (plan.method, plan.blocks) == expected


def test_a_wish_that_does_not_fit_is_refused_not_bent(arch: Architecture) -> None:
    plan = plan_for(arch, WORK, "suffix-bp", 4)
    with pytest.raises(PassRefused) as refusal:
        choose(arch, WORK, available=plan.needed + 9 * MB, reserve=10 * MB, method="suffix-bp", blocks=4)
    assert refusal.value.shortfall == MB
    assert (
        choose(arch, WORK, available=plan.needed + 10 * MB, reserve=10 * MB, method="suffix-bp", blocks=4).plan == plan
    )


def test_a_refusal_says_what_was_needed_what_there_was_and_what_to_reduce(arch: Architecture) -> None:
    mezo = plan_for(arch, WORK, "mezo", 0)
    with pytest.raises(PassRefused) as refusal:
        choose(arch, WORK, available=60 * MB, reserve=50 * MB, limit=40 * MB)
    assert refusal.value.shortfall == mezo.needed - 10 * MB
    message = str(refusal.value)
    assert f"(mezo) needs {mezo.needed / 1e6:.1f} MB" in message
    assert "60.0 MB are available" in message
    assert "keeps 50.0 MB" in message
    assert "memory.limit allows 40.0 MB" in message
    assert f"({refusal.value.shortfall} bytes) short" in message
    assert "background KV cache" in message
    assert "lower model.context" in message


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
def test_wishes_that_cannot_be_met(arch: Architecture, wish: dict[str, object], message: str) -> None:
    ask: Callable[..., object] = choose
    with pytest.raises(PassRefused, match=message) as refusal:
        ask(arch, WORK, available=16_000 * MB, reserve=0, **wish)
    assert refusal.value.shortfall == 0


def test_a_plan_accounts_for_every_byte(arch: Architecture) -> None:
    plan = plan_for(arch, WORK, "elasticzo", 4)
    assert plan.needed == sum(plan.predicted.values()) == plan.needed_by("engine") + plan.needed_by("trainer")
    assert len(plan.predicted) == len(plan.terms)
    assert all(term.bytes >= 0 and term.formula for term in plan.terms)
    tree = choose(arch, WORK, available=4_000 * MB, reserve=0).as_json()
    assert tree["needed_bytes"] == sum(term["bytes"] for term in tree["terms"])
    assert {"method", "blocks", "needed_bytes", "shortfall_bytes"} == set(tree["considered"][0])


def test_measured_fixed_costs_replace_the_constants(arch: Architecture) -> None:
    usual, measured = (
        Plan("suffix-bp", 1, plan_for(arch, WORK, "suffix-bp", 1, runtime=runtime).terms)
        for runtime in (None, {"trainer": 100 * MB, "engine": MB})
    )
    assert measured.predicted["trainer: runtime"] == 100 * MB
    assert measured.predicted["engine: runtime"] == MB
    assert measured.needed < usual.needed
