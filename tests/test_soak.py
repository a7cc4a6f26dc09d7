"""The short version of tools/soak.py, on a tiny model."""

import pytest

from tools import soak
from tools.processes import TinyDaemon


def test_a_minute_of_everything_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with TinyDaemon(settings=soak.settings(trial=0.5)) as daemon:
        soak.prepare(daemon, soak.made_up(120))
        findings = soak.soak(daemon, 60, every=8, passes=2)
    with capsys.disabled():
        print(f"\nsoak: {soak.told(findings, 60)}")
    assert not findings.problems, soak.told(findings, 60)
    counts = findings.counts
    assert counts["answers"] > 20
    assert counts["feedback"] > 5
    assert min(counts[what] for what in ("hung up", "refused", "engine killed")) > 0
