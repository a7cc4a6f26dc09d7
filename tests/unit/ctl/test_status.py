"""What `agentctl status` says is missing until a pass starts by itself."""

from typing import Any

import pytest

from agentd.ctl.status import summary
from tests.support.scripted_daemon import RECORDED

SHORT = "about 15 more examples until a pass can be judged (17 are held out, gate.min_holdout asks for 20)"


@pytest.mark.parametrize(
    ("trigger", "said"),
    [
        ({"new_examples": 12, "waiting": {}}, "52 more new examples"),
        ({"new_examples": 0, "waiting": {}}, "64 more new examples"),
        ({"new_examples": 80, "waiting": {}}, "as soon as nothing else is to be done"),
        ({"new_examples": 0, "waiting": {"reviews": SHORT}}, f"reviews: {SHORT}"),
        ({"new_examples": 3, "waiting": {"reviews": SHORT}}, f"61 more new examples; reviews: {SHORT}"),
        ({"new_examples": 3, "waiting": {}, "paused": True}, "paused; `agentctl resume` lets passes start again"),
    ],
)
def test_what_is_missing_until_the_next_pass(trigger: dict[str, Any], said: str) -> None:
    status = RECORDED["GET /admin/status"]
    assert summary({**status, "next_trigger": {**status["next_trigger"], **trigger}})["next pass"] == said


def test_examples_that_cannot_be_used_are_counted() -> None:
    status = {**RECORDED["GET /admin/status"], "unusable_examples": {"sentiment": 2}}
    assert summary(status)["examples of sentiment"] == "12 new, 500 used, 120 holdout, 2 cannot be used"
