import pytest

from agentd.budget.calibration import HIGHEST, LOWEST, MARGIN, WINDOW, Measured, factors, family, measured

MB = 10**6
BP = family("elasticzo", 4)


def test_the_factor_covers_every_recent_peak() -> None:
    history = [Measured("trainer", BP, 500 * MB, peak * MB) for peak in (480, 510, 495)]
    factor = factors(history)["trainer", BP]
    assert factor.factor == pytest.approx(MARGIN * 510 / 500)
    assert factor.passes == 3
    assert all(each.peak <= factor.factor * each.predicted for each in history)


def test_old_passes_are_forgotten() -> None:
    recent = [Measured("trainer", BP, 500 * MB, 450 * MB)] * WINDOW
    old = Measured("trainer", BP, 500 * MB, 700 * MB)
    assert factors([*recent, old])["trainer", BP].factor == pytest.approx(MARGIN * 0.9)
    assert factors([*recent[1:], old])["trainer", BP].factor == pytest.approx(MARGIN * 1.4)


@pytest.mark.parametrize(("peak", "bound"), [(10, LOWEST), (5000, HIGHEST)])
def test_a_factor_is_bounded(peak: int, bound: float) -> None:
    assert factors([Measured("engine", BP, 100 * MB, peak * MB)])["engine", BP].factor == bound


def test_families_and_processes_are_kept_apart() -> None:
    names = {family("mezo", 0), BP, family("suffix-bp", 4, checkpoint=True)}
    assert len(names) == 3
    assert family("suffix-bp", 1) == family("elasticzo", 30)
    history = [Measured("trainer", name, 100, 100 + i) for i, name in enumerate(sorted(names))]
    assert len(factors([*history, Measured("engine", BP, 100, 120)])) == 4
    assert factors([]) == {}


def test_a_pass_as_it_was_recorded() -> None:
    predicted = {"engine: KV": 40, "engine: logits": 60, "trainer: runtime": 300, "trainer: calibration": -30}
    peaks = {"engine": 90, "trainer": 310, "daemon": 60}
    assert measured("elasticzo", 4, False, predicted, peaks) == [
        Measured("engine", BP, 100, 90),
        Measured("trainer", BP, 300, 310),
    ]
    # A pass that failed before its trainer started says nothing about the trainer.
    assert [each.process for each in measured("elasticzo", 4, False, predicted, {"engine": 90})] == ["engine"]
