"""What `agentctl status` says is missing until a pass starts by itself."""

from typing import Any

import pytest

from agentd.ctl.status import summary
from tests.support.scripted_daemon import RECORDED

FEW = "17 are held out, gate.min_holdout asks for 20"
REVIEWS = {"reviews": {"more": 15, "until": "first pass", "reason": FEW}}
HOME = {"home": {"more": 65, "until": "next pass", "reason": None}}
MONO = {"mono": {"more": None, "until": "first pass", "reason": "all its training examples have the same label"}}


@pytest.mark.parametrize(
    ("trigger", "said"),
    [
        ({"new_examples": 0, "missing": {}}, "64 more new examples"),
        ({"new_examples": 80, "missing": {}}, "as soon as nothing else is to be done"),
        ({"new_examples": 80, "missing": MONO}, "as soon as nothing else is to be done"),
        ({"new_examples": 0, "missing": REVIEWS}, f"reviews: about 15 more until the first pass ({FEW})"),
        (
            {"new_examples": 12, "missing": {**HOME, **MONO}},
            "home: about 65 more until the next pass; mono: all its training examples have the same label",
        ),
        ({"new_examples": 3, "missing": {}, "paused": True}, "paused; `agentctl resume` lets passes start again"),
    ],
)
def test_what_is_missing_until_the_next_pass(trigger: dict[str, Any], said: str) -> None:
    status = RECORDED["GET /admin/status"]
    assert summary({**status, "next_trigger": {**status["next_trigger"], **trigger}})["next pass"] == said


def test_examples_that_cannot_be_used_are_counted() -> None:
    status = {
        **RECORDED["GET /admin/status"],
        "unusable_examples": {"sentiment": 2, "home": 7},
        "stale_examples": {"sentiment": 3},
    }
    assert summary(status)["examples of sentiment"] == (
        "12 new, 500 used, 120 holdout, 2 cannot be used, 3 set aside, their label, its meaning or their tool is gone"
    )
    assert summary(status)["examples of home"] == "0 new, 0 used, 0 holdout, 7 cannot be used"
