"""Low-rank factors of several boards as one: the mean of products, not the product of means."""

import numpy as np
import pytest
from agentd_flower import adapters
from agentd_flower.adapters import Factors
from agentd_flower.wire import Unusable

DICE = np.random.default_rng(2)
NOTHING = Factors({})


def factors(rank: int = 2, names: tuple[str, ...] = ("x", "y"), scale: float = 1.0) -> Factors:
    return Factors(
        {name: (DICE.standard_normal((rank, 12)), scale * DICE.standard_normal((9, rank))) for name in names}, "llama"
    )


def dense(each: Factors, name: str = "x") -> np.ndarray:
    a, b = each.pairs[name]
    return b @ a


def test_the_mean_is_that_of_the_products() -> None:
    boards = [factors(), factors()]
    moved, kept = adapters.averaged(NOTHING, boards, [3, 1], robust="mean", trim=0.2, rank=8)
    shorter = min(each.norm() for each in boards)
    parts = [
        share * each.scaled(min(1, shorter / each.norm())).norm()
        for share, each in zip((0.75, 0.25), boards, strict=True)
    ]
    assert kept == pytest.approx(1.0)
    assert moved.norm() < sum(parts) + 1e-9
    expected = sum(
        share * dense(each.scaled(min(1, shorter / each.norm())))
        for share, each in zip((0.75, 0.25), boards, strict=True)
    )
    np.testing.assert_allclose(dense(moved), expected, atol=1e-9)
    means = [np.mean([each.pairs["x"][part] for each in boards], axis=0) for part in (0, 1)]
    assert not np.allclose(means[1] @ means[0], expected, atol=0.1)  # which is what averaging A and B would give


def test_a_lower_rank_is_the_nearest() -> None:
    whole = adapters.side_by_side([factors(), factors(), factors()], [1.0, 1.0, 1.0])
    nearest, kept = adapters.truncated(whole, 2)
    u, values, v = np.linalg.svd(dense(whole))
    np.testing.assert_allclose(dense(nearest), u[:, :2] * values[:2] @ v[:2], atol=1e-9)
    assert nearest.rank == 2
    assert 0.3 < kept < 1


def test_it_starts_from_what_the_fleet_has_and_boards_may_lack_layers() -> None:
    start, one = factors(), factors(names=("x",))
    moved, _ = adapters.averaged(start, [one], [1], robust="mean", trim=0.2, rank=8)
    np.testing.assert_allclose(dense(moved), dense(start) + dense(one), atol=1e-9)
    np.testing.assert_allclose(dense(moved, "y"), dense(start, "y"), atol=1e-9)


def test_an_adapter_that_goes_on_from_the_fleets_is_a_change_of_it() -> None:
    start, change = factors(), factors(rank=1)
    whole = adapters.side_by_side([start, change], [1.0, 1.0])
    assert whole.minus(start).norm() == pytest.approx(change.norm())
    np.testing.assert_allclose(dense(whole.minus(start)), dense(change), atol=1e-9)


@pytest.mark.parametrize("bad", [-1.0, -1000.0, 1000.0])
def test_one_of_five_boards_does_not_turn_the_fleet(bad: float) -> None:
    true = factors()
    honest = [adapters.side_by_side([true, factors(scale=0.3)], [1.0, 1.0]) for _ in range(4)]
    moved, _ = adapters.averaged(NOTHING, [*honest, true.scaled(bad)], [1] * 5, robust="trimmed", trim=0.2, rank=9)
    cosine = np.sum(dense(moved) * dense(true)) / np.linalg.norm(dense(moved)) / np.linalg.norm(dense(true))
    assert cosine > 0.85
    assert moved.norm() < 1.5 * true.norm()


def test_a_trimmed_mean_is_one_of_products() -> None:
    boards = [factors(rank=1) for _ in range(3)]
    shortest = sorted(each.norm() for each in boards)[1]
    moved, _ = adapters.averaged(NOTHING, boards, [1] * 3, robust="trimmed", trim=0.2, rank=9)
    products = np.stack([dense(each.scaled(min(1, shortest / each.norm()))) for each in boards])
    np.testing.assert_allclose(dense(moved), np.median(products, axis=0), atol=1e-6)


def test_files_come_back() -> None:
    mine = factors(rank=3)
    for again in (
        adapters.read_safetensors(adapters.write_safetensors(mine)),
        adapters.read_gguf(adapters.write_gguf(mine)),
    ):
        for name in mine.pairs:
            np.testing.assert_allclose(dense(again, name), dense(mine, name), rtol=1e-5, atol=1e-5)
    assert adapters.read_gguf(adapters.write_gguf(mine)).architecture == "llama"


def test_layers_of_different_ranks_are_filled_up() -> None:
    mine = Factors({**factors(rank=1, names=("x",)).pairs, **factors(rank=3, names=("y",)).pairs})
    again = adapters.read_safetensors(adapters.write_safetensors(mine))
    assert {len(a) for a, _ in again.pairs.values()} == {3}
    np.testing.assert_allclose(dense(again), dense(mine), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", [adapters.read_safetensors, adapters.read_gguf])
@pytest.mark.parametrize("data", [b"", b"GGUF", b"\xff" * 1000, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_garbage_is_refused(read: object, data: bytes) -> None:
    with pytest.raises(Unusable):
        read(data)  # type: ignore[operator]


def test_what_is_not_finite_or_does_not_fit_is_refused() -> None:
    a, b = factors().pairs["x"]
    with pytest.raises(Unusable, match="not finite"):
        adapters.read_safetensors(adapters.write_safetensors(Factors({"x": (a * np.nan, b)})))
    other = Factors({"x": (DICE.standard_normal((2, 5)), b)})
    with pytest.raises(Unusable, match="different shapes"):
        adapters.side_by_side([factors(), other], [1.0, 1.0])
