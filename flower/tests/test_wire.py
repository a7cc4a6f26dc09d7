"""The formats, against agentd's own readers and writers, which need nothing but Python."""

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
from agentd_flower import wire
from agentd_flower.wire import FleetFile, Unusable

from agentd.learn import ledger
from agentd.revision import fleet_file

FACTS = {"engine": "transformers", "base_sha256": "ab" * 32, "dtype": "float32"}
SUMS = {(1 << 40) + i: 0.001 * (i - 7) for i in range(32)}


def test_agentd_reads_what_the_fleet_writes() -> None:
    data = FleetFile(FACTS, {"ledger": wire.encode_ledger(SUMS)}).encode()
    theirs = fleet_file.decode(data)
    assert theirs.encode() == data
    steps = ledger.decode(theirs.files["ledger"])
    assert {step.seed: step.coefficient for step in steps.steps} == pytest.approx(SUMS)
    assert theirs.archive("a round").identity == ""
    assert fleet_file.digest(data) == wire.digest(data)


def test_the_fleet_reads_what_agentd_writes() -> None:
    steps = [ledger.Step(seed, -value, 1.0, 1e-3) for seed, value in SUMS.items()]
    data = fleet_file.FleetFile(FACTS, {"ledger": ledger.encode(ledger.Ledger(0, steps)), "a": b"b"}).encode()
    mine = wire.decode(data)
    assert mine.encode() == data
    assert wire.decode_ledger(mine.files["ledger"]) == pytest.approx(SUMS)


def test_steps_along_one_direction_add_up() -> None:
    steps = [ledger.Step(5, 2.0, 0.5, 1e-3), ledger.Step(5, -1.0, 0.25, 1e-3)]
    assert wire.decode_ledger(ledger.encode(ledger.Ledger(0, steps))) == {5: pytest.approx(-0.75)}


WHOLE = FleetFile(FACTS, {"ledger": wire.encode_ledger(SUMS)}).encode()


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, WHOLE[:-1], WHOLE + b"x", WHOLE.replace(b"fleet 1", b"fleet 2")])
def test_garbage_is_no_file(data: bytes) -> None:
    with pytest.raises(Unusable):
        wire.decode(data)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:40] + b"?" + d[41:], lambda d: b"", lambda d: d * 2])
def test_garbage_is_no_ledger(change: object) -> None:
    with pytest.raises(Unusable):
        wire.decode_ledger(change(wire.encode_ledger(SUMS)))  # type: ignore[operator]


def test_a_step_that_is_not_finite_is_refused() -> None:
    with pytest.raises(Unusable, match="not finite"):
        wire.decode_ledger(wire.encode_ledger({1: math.inf}))
