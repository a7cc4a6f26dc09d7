import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agentd.host import openmp
from agentd.host.openmp import Spinning

# Seconds of processor that a team of two takes while it waits for 0.3 s: for ever, for a moment, for ever.
_PROGRAM = """
import ctypes, time
from agentd.host.openmp import Team
library = ctypes.CDLL("libgomp.so.1")
def spent():
    library.GOMP_parallel(ctypes.cast(library.omp_get_level, ctypes.c_void_p), None, 2, 0)
    began = time.process_time()
    time.sleep(0.3)
    return time.process_time() - began
team = Team(max(2, library.omp_get_num_procs()))
print(spent())
team.begin()
print(spent())
team.end()
time.sleep(0.2)  # its thread ends a little later than Python says
print(spent())
"""


@pytest.fixture
def spinning() -> Iterator[Spinning]:
    pytest.importorskip("llama_cpp")  # which brings OpenMP
    local = Spinning(2, cores=2)
    yield local
    local.close()
    assert not local.short


def decode(spinning: Spinning, short: float, long: float, n: int = 400, rows: int = 1) -> list[float]:
    """Decodes that take so long each way; the times that they took."""
    taken = []
    for _ in range(n):
        taken.append(short if spinning.short else long)
        spinning.decoded(rows, taken[-1])
    return taken


def test_threads_spin_as_makes_tokens_faster(spinning: Spinning) -> None:
    assert spinning.short  # until it is known better
    taken = decode(spinning, short=0.02, long=0.01)
    assert taken.count(0.02) < 100


def test_what_does_harm_is_tried_for_one_token_and_ever_more_rarely(spinning: Spinning) -> None:
    assert decode(spinning, short=0.02, long=1.0, n=4000).count(1.0) < 12


def test_when_others_come_threads_sleep_soon(spinning: Spinning) -> None:
    decode(spinning, short=0.02, long=0.01)
    crowded = decode(spinning, short=0.03, long=0.5, n=50)
    assert crowded.count(0.5) <= 4
    assert decode(spinning, short=0.02, long=0.01).count(0.01) > 250  # they have gone


def test_background_work_spins_briefly_and_serving_goes_on_as_it_was(spinning: Spinning) -> None:
    decode(spinning, short=0.02, long=0.01, n=100)
    modes = []
    for serving in (True, False, False, True):
        spinning.begin(serving=serving)
        modes.append(spinning.short)
    assert modes == [False, True, True, False]


def test_only_decodes_of_as_many_tokens_are_compared(spinning: Spinning) -> None:
    for _ in range(100):
        decode(spinning, short=0.02, long=0.01, n=5, rows=1)
        decode(spinning, short=0.04, long=0.02, n=5, rows=4)
    assert spinning.short
    decode(spinning, short=0.02, long=0.001, rows=256)  # a prompt
    assert spinning.short


def test_one_thread_has_no_one_to_wait_for() -> None:
    assert openmp.spin_count(1) < 1000
    assert not Spinning(1).short


def test_a_team_that_does_nothing_makes_the_others_sleep() -> None:
    library = pytest.importorskip("llama_cpp")
    environment = {**os.environ, "GOMP_SPINCOUNT": "100000000000"}
    run = subprocess.run(
        [sys.executable, "-c", "import llama_cpp\n" + _PROGRAM], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, (library, run.stderr)
    before, short, after = map(float, run.stdout.split())
    assert short < 0.01 < min(before, after)
