from typing import Any

import pytest

from agentd.budget.calibration import MARGIN, family
from agentd.budget.history import calibration, outcomes

MB = 10**6


def row(**changes: Any) -> dict[str, Any]:
    """A pass as its record has it."""
    figures = {"adapted": True, "before": {"accuracy": 0.6, "loss": 0.9}, "after": {"accuracy": 0.85, "loss": 0.4}}
    usual = {
        "state": "committed",
        "method": "elasticzo",
        "blocks": 4,
        "plan": {"checkpoint": False},
        "predicted": {"engine: KV": 50 * MB, "engine: logits": 50 * MB, "trainer: runtime": 500 * MB},
        "peaks": {"engine": 260 * MB, "trainer": 480 * MB, "total": 800 * MB, "before": 230 * MB},
        "gate": {"tasks": {"reviews": figures}},
        "phases": {"tap": 40.0, "train": 30.5, "gate": 20.0},
    }
    return {**usual, **changes}


def test_gain_and_seconds_of_earlier_passes() -> None:
    (past,) = outcomes([row()])
    assert (past.method, past.blocks, past.seconds) == ("elasticzo", 4, 90.5)
    assert past.gain == pytest.approx(0.25)
    assert outcomes([row(plan={"checkpoint": False, "computed_seconds": 70.0})])[0].computed == 70.0
    assert outcomes([row(state="rejected"), row(state="rolled_back")])[1].gain == 0
    assert outcomes([row(state="failed"), row(state="refused", method=None), row(phases={})]) == []


def test_the_gain_on_free_text_is_the_loss_taken_away() -> None:
    texts = {"adapted": True, "before": {"accuracy": None, "loss": 2.0}, "after": {"accuracy": None, "loss": 1.5}}
    other = {"adapted": False, "before": {"accuracy": 0.9, "loss": 1}, "after": {"accuracy": 0.8, "loss": 1}}
    assert outcomes([row(gate={"tasks": {"letters": texts, "old": other}})])[0].gain == pytest.approx(0.25)


def test_calibration_takes_what_a_process_added() -> None:
    name = family("elasticzo", 4)
    factors = calibration([row()])
    assert set(factors) == {("trainer", name)}  # what the engine had before is not known here
    assert factors["trainer", name].factor == pytest.approx(MARGIN * 480 / 500)
    known = {"engine": 260 * MB, "engine_before": 165 * MB, "trainer": 480 * MB}
    assert calibration([row(peaks=known)])["engine", name].factor == pytest.approx(MARGIN * 0.95)


def test_passes_that_were_cut_short_calibrate_nothing() -> None:
    assert calibration([row(state="failed"), row(state="refused"), row(predicted={})]) == {}
