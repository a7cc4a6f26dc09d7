import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agentd.learn.ledger import Ledger, Step, decode, encode, float32, fold, read, write
from agentd.learn.philox import rademacher


def some_ledger(n: int = 6) -> Ledger:
    generator = random.Random(1)
    return Ledger(
        41, [Step(generator.getrandbits(64), generator.gauss(0, 3), generator.random() / 20, 0.1) for _ in range(n)]
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ledger = some_ledger()
    write(tmp_path / "ledger", ledger)
    assert read(tmp_path / "ledger") == ledger
    assert encode(read(tmp_path / "ledger")) == (tmp_path / "ledger").read_bytes()


def test_a_step_costs_twenty_bytes() -> None:
    assert len(encode(some_ledger(7))) - len(encode(some_ledger(6))) == 20


def test_the_format_does_not_drift() -> None:
    # Old revisions must stay readable: these bytes were written by version 1 of the format.
    golden = (
        "4147454e54445a4f" "01000000" "0300000000000000" "0100000000000000"
        "2a00000000000000" "0000c0bf" "0000803d" "cdcccc3d"
    )  # fmt: skip
    encoded = encode(Ledger(3, [Step(42, -1.5, 0.0625, 0.1)]))
    assert encoded[:-4].hex() == golden
    assert encoded[-4:].hex() == "8f8fb251"


def test_replay_is_bit_exact() -> None:
    def apply(theta: NDArray[np.float32], seed: int, coefficient: float) -> None:
        theta += np.float32(coefficient) * rademacher(seed, 1, theta.size)

    ledger = some_ledger(50)
    live, replayed = (np.zeros(576, np.float32) for _ in range(2))
    for step in ledger.steps:
        apply(live, step.seed, step.coefficient)
    for seed, coefficient in fold(decode(encode(ledger)).steps):
        apply(replayed, seed, coefficient)
    assert live.tobytes() == replayed.tobytes()
    assert np.abs(live).max() > 0


def test_the_coefficient_is_that_of_float32_arithmetic() -> None:
    for step in some_ledger(200).steps:
        expected = -(np.float32(step.lr) * np.float32(step.projected_gradient))
        assert np.float32(step.coefficient).tobytes() == expected.tobytes()
        assert float32(step.coefficient) == step.coefficient


def test_every_truncation_is_noticed() -> None:
    data = encode(some_ledger())
    for length in range(len(data)):
        with pytest.raises(ValueError, match="cut short"):
            decode(data[:length])
    with pytest.raises(ValueError, match="damaged"):
        decode(data + b"\0")


def test_every_flipped_bit_is_noticed() -> None:
    data = encode(some_ledger(3))
    for position in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"ledger"):
            decode(bytes(damaged))


def test_the_file_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"GGUF and other things")
    with pytest.raises(ValueError, match=r"ledger: this is no ledger"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


def test_a_newer_format_is_named() -> None:
    data = bytearray(encode(some_ledger()))
    data[8] = 2
    with pytest.raises(ValueError, match="format version 2"):
        decode(bytes(data))


@pytest.mark.parametrize(
    "values",
    [(-1, 0.0, 0.0, 0.1), (1 << 64, 0.0, 0.0, 0.1), (0, float("nan"), 0.0, 0.1), (0, 1e39, 0.0, 0.1),
     (0, 1e30, 1e30, 0.1)],
)  # fmt: skip
def test_steps_that_could_not_be_replayed_are_refused(values: tuple[int, float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"seed"):
        Step(*values)
