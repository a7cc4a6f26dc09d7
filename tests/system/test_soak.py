"""The short version of tools/soak.py, on a tiny model."""

from collections.abc import Callable

from tools import soak
from tools.daemon import DaemonProcess


def test_a_minute_of_everything_at_once(note: Callable[[str], None]) -> None:
    with DaemonProcess(settings=soak.settings(trial=0.5)) as daemon:
        daemon.start()
        soak.prepare(daemon, soak.made_up(120))
        findings = soak.soak(daemon, 60, every=8, passes=2)
    note(f"soak: {soak.summary(findings, 60)}")
    assert not findings.problems, soak.summary(findings, 60)
    counts = findings.counts
    assert counts["answers"] > 20
    assert counts["feedback"] > 5
    assert min(counts[what] for what in ("hung up", "refused", "engine killed")) > 0
