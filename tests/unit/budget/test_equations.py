from dataclasses import replace
from itertools import pairwise

import pytest

from agentd.budget.equations import (
    LLAMA_2_7B,
    NAMED,
    SWEPT,
    Transformer,
    activations,
    backpropagation,
    figure_3,
    mezo,
    parameters,
    ratio,
    sweep,
)


@pytest.mark.parametrize(
    ("change", "plain", "checkpointed"),
    [
        ({"N": 1}, 2.000, 2.000),
        ({"N": 2048}, 3.997, 2.243),
        ({"N": 4096}, 7.860, 2.714),
        ({"N": 8192}, 16.092, 3.718),
        ({"N": 16384}, 25.140, 4.821),
        ({"N": 32768}, 29.880, 5.398),
        ({"L": 1}, 1.492, 1.492),
        ({"L": 100}, 4.245, 2.183),
        ({"D": 512}, 23.777, 4.655),
        ({"D": 32768}, 2.106, 2.013),
    ],
)
def test_worked_values_for_llama_2_7b(change: dict[str, int], plain: float, checkpointed: float) -> None:
    model = replace(LLAMA_2_7B, **change)
    assert ratio(model) == pytest.approx(plain, abs=5e-4)
    assert ratio(model, checkpointing=True) == pytest.approx(checkpointed, abs=5e-4)


def test_absolute_values_in_gigabytes() -> None:
    assert backpropagation(LLAMA_2_7B) / 1e9 == pytest.approx(57.42, abs=5e-3)
    assert mezo(LLAMA_2_7B) / 1e9 == pytest.approx(14.37, abs=5e-3)
    assert backpropagation(LLAMA_2_7B, checkpointing=True) / 1e9 == pytest.approx(32.23, abs=5e-3)
    long = replace(LLAMA_2_7B, N=32768)
    assert backpropagation(long) / 1e9 == pytest.approx(5670.4, abs=0.05)
    assert mezo(long) / 1e9 == pytest.approx(189.8, abs=0.05)


def test_limit_of_deep_models() -> None:
    deep = replace(LLAMA_2_7B, L=10**12)
    assert ratio(deep) == pytest.approx(4.375, abs=1e-4)
    assert ratio(deep, checkpointing=True) == pytest.approx(2.0, abs=1e-4)


def test_gpt2_medium_as_in_figure_4() -> None:
    gpt2_medium = Transformer(N=512, L=24, D=1024, H=16, V=50257, B=8, b=4)
    assert backpropagation(gpt2_medium) / 1e9 == pytest.approx(17.13, abs=5e-3)
    assert backpropagation(replace(gpt2_medium, N=1024, b=2)) / 1e9 == pytest.approx(24.6, abs=0.05)


def test_the_ends_of_mezo() -> None:
    ideal, like_bp = replace(LLAMA_2_7B, L_kept=0), replace(LLAMA_2_7B, L_kept=32)
    assert mezo(ideal) == LLAMA_2_7B.b * parameters(LLAMA_2_7B)
    assert mezo(like_bp) - mezo(ideal) == pytest.approx(activations(LLAMA_2_7B))
    # The claim of the paper: a model at least twice as large in the same memory.
    assert backpropagation(LLAMA_2_7B) >= 2 * mezo(ideal)


def test_parameters_of_known_feed_forward_networks() -> None:
    # GPT-2: two matrices of 4 D; Llama 2: three of 11008, which is 2.6875 D
    assert parameters(LLAMA_2_7B) == parameters(LLAMA_2_7B, 2, 4 * 4096)
    assert parameters(LLAMA_2_7B, 3, 11008) == pytest.approx(6.738e9, rel=1e-3)


def test_what_the_papers_text_quotes() -> None:
    """Its rounding is coarser than the equations: it reads its figures."""
    deep, narrow, wide = ({"L": 100}, {"D": 512}, {"D": 32768})
    plain = [ratio(replace(LLAMA_2_7B, **change)) for change in (deep, narrow, wide)]
    checkpointed = [ratio(replace(LLAMA_2_7B, **change), checkpointing=True) for change in (deep, narrow)]
    assert plain == [pytest.approx(4.23, rel=5e-3), pytest.approx(24, rel=1e-2), pytest.approx(2, abs=0.11)]
    assert checkpointed == [pytest.approx(2.17, rel=1e-2), pytest.approx(5, abs=0.5)]
    assert ratio(replace(LLAMA_2_7B, L=10**9)) == pytest.approx(4.38, abs=6e-3)
    long = replace(LLAMA_2_7B, N=16384)
    assert (round(ratio(long)), round(ratio(long, checkpointing=True))) == (25, 5)


def test_sweeps_are_the_equations_at_each_value() -> None:
    for symbol, values in SWEPT.items():
        points = sweep(LLAMA_2_7B, symbol, values)
        assert [point.value for point in points] == list(values)
        for point in points:
            changed = replace(LLAMA_2_7B, **{symbol: point.value})
            assert point.ratio == ratio(changed)
            assert point.ratio_checkpointed == ratio(changed, checkpointing=True)
            assert point.as_json()["mezo_bytes"] == mezo(changed)


@pytest.mark.parametrize("name", NAMED)
def test_figure_3_covers_the_model_itself(name: str) -> None:
    curves = figure_3(NAMED[name])
    assert list(curves) == ["N", "L", "D"]
    for symbol, points in curves.items():
        values = [point.value for point in points]
        assert values == sorted(set(values))
        assert values[0] <= getattr(NAMED[name], symbol) <= values[-1]
        # Longer contexts and deeper models need more memory; so do wider ones.
        assert all(before.mezo < after.mezo for before, after in pairwise(points))
