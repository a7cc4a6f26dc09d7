"""What a machine was found to do for passes is not measured again by the next start."""

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.tiny_passes import LLAMACPP, adapt, begin, finished, gguf, progress, teach
from tools.daemon import DaemonProcess, eventually


def kept(daemon: DaemonProcess) -> list[str]:
    with closing(sqlite3.connect(daemon.state / "agentd.db")) as db:
        return [row[0] for row in db.execute("SELECT facts FROM measurements")]


def plan(daemon: DaemonProcess) -> None:
    """A pass that ends once it is planned."""
    number = begin(daemon, method="suffix-bp", blocks=1)
    eventually(lambda: progress(daemon)["phase"] not in (None, "plan"), 60)
    assert daemon.post("/admin/cancel", admin=True).status == 200
    assert finished(daemon, number)["reason"] == "cancelled by the owner"


def test_blocks_are_compared_once_and_not_at_every_start(tmp_path: Path) -> None:
    with DaemonProcess(gguf(tmp_path), LLAMACPP) as daemon:
        daemon.start()
        teach(daemon, 40)
        first = adapt(daemon, method="suffix-bp", blocks=1)
        assert first["state"] in ("committed", "rejected"), first
        (facts,) = kept(daemon)
        assert '"cosines":[' in facts
        assert "engine_runtime_bytes" in facts
        log = daemon.state / "passes" / "probe.log"
        assert log.exists()  # of the trainer that was asked
        assert daemon.stop() == 0

        log.unlink()
        daemon.start()
        plan(daemon)
        assert not log.exists()
        assert kept(daemon) == [facts]
        assert daemon.stop() == 0

        # under another key nothing is known
        with closing(sqlite3.connect(daemon.state / "agentd.db")) as db, db:
            db.execute("UPDATE measurements SET key = 'of another machine'")
        daemon.start()
        plan(daemon)
        assert log.exists()
        assert len(kept(daemon)) == 2
