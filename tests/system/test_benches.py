"""Programs under tools/ that start daemons."""

import signal
import subprocess
import sys

import psutil

from tools.daemon import ROOT, eventually, lives


def test_a_benchmark_that_is_ended_leaves_no_daemon_behind() -> None:
    command = [sys.executable, "-m", "tools.bench", "continual", "tiny", "--days", "2", "--names", "reviews"]
    bench = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        there = eventually(lambda: psutil.Process(bench.pid).children(recursive=True)[1:], 60)  # the daemon, its engine
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 128 + signal.SIGTERM
        assert eventually(lambda: not any(map(lives, there)), 10)
    finally:
        bench.kill()
        bench.wait()
