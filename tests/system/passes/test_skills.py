"""What a pass's record, and its revision, say of the skills of base and candidate; with both engines of language."""

import copy
from pathlib import Path
from typing import Any

import pytest

from agentd.adapt.gate import skills
from tests.support import tiny_passes
from tests.support.tiny_passes import Learner, adapt, gguf, manifest, teach

GROUPS = {probe.group for probe in skills.probes()}


@pytest.mark.parametrize("engine", ["llamacpp", "transformers"])
def test_skills_are_scored_at_the_gate(tmp_path: Path, engine: str) -> None:
    settings: dict[str, Any] = copy.deepcopy(tiny_passes.LLAMACPP if engine == "llamacpp" else tiny_passes.SETTINGS)
    settings["adapt"]["gate"]["max_skill_loss"] = 0.99
    with Learner(gguf(tmp_path), settings) as daemon:
        daemon.start()
        teach(daemon, 60)
        row = adapt(daemon, method="mezo", zo_steps=20)
        assert row["state"] == "committed", row["reason"]
        shown = row["gate"]["skills"]
        assert shown.keys() == GROUPS
        assert all(0 < figures["before"] < 1 and 0 < figures["after"] < 1 for figures in shown.values())
        assert any(figures["before"] != figures["after"] for figures in shown.values())
        assert manifest(daemon, row["revision"])["skills"] == shown
        # what the base scores is known: the next pass finds the same
        teach(daemon, 100)
        again = adapt(daemon, method="mezo", zo_steps=20)["gate"]["skills"]
        assert [again[group]["before"] for group in GROUPS] == [shown[group]["before"] for group in GROUPS]
