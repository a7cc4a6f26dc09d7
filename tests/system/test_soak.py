"""The short version of tools/soak.py, on a tiny model."""

from collections.abc import Callable

from tools import soak
from tools.daemon import DaemonProcess

SECONDS = 30  # or longer, until two passes have come to a verdict


def test_everything_at_once(note: Callable[[str], None]) -> None:
    with DaemonProcess(settings=soak.settings(trial=0.5)) as daemon:
        daemon.start()
        soak.prepare(daemon, soak.made_up(120))
        findings = soak.soak(daemon, SECONDS, every=12, passes=2)
    note(f"soak: {soak.summary(findings, SECONDS)}")
    assert not findings.problems, soak.summary(findings, SECONDS)
    counts = findings.counts
    assert counts["answers"] > 20
    assert counts["feedback"] > 5
    assert min(counts[what] for what in ("hung up", "refused", "engine killed")) > 0
