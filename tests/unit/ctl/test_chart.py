from agentd.ctl import chart, output


def test_a_falling_curve_falls_from_the_first_line_to_the_last() -> None:
    lines = chart.line([3.0, 2.0, 1.0, 0.0], width=4, height=2)
    assert lines == ["3 ┤⠑⢄", "0 ┤⠀⠀⠑⢄"]


def test_a_rising_curve_keeps_together_where_it_is_steep() -> None:
    assert chart.line([0.0, 1.0], width=1, height=2) == ["1 ┤⢸", "0 ┤⡸"]


def test_many_values_are_averaged_into_the_width() -> None:
    lines = chart.line([float(i % 2) for i in range(1000)], width=20, height=3)
    assert len(lines) == 3
    assert max(len(line.split("┤")[1]) for line in lines) <= 20


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert chart.line([float("nan"), float("inf")]) == []
    assert chart.line([]) == []
    assert chart.line([1.0, float("nan"), 1.0])[0].startswith("1 ┤")


def test_quantities_carry_their_unit() -> None:
    assert output.human("peak_bytes", 412 * 2**20) == "412.0 MiB"
    assert output.human("phases.train", 83.4) == "1 min 23 s"
    assert output.human("swap_ms", 3.5) == "3.5 ms"
    assert output.human("loss", 0.123456) == "0.1235"
    assert output.human("serving", True) == "yes"
    assert output.human("reason", None) == "-"
    assert output.duration(3725.5) == "1 h 02 min"
    assert output.size(5 * 2**30) == "5.00 GiB"
