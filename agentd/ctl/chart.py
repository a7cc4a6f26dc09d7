"""A line chart in braille characters: two by four dots per character cell."""

from collections.abc import Sequence
from itertools import pairwise

_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # [column][row from the top], Unicode block 2800


def line(
    values: Sequence[float], width: int = 60, height: int = 8, *, low: float | None = None, high: float | None = None
) -> list[str]:
    """`values` from left to right as `height` lines of `width` cells, with the largest and smallest as axis labels, or
    with `low` and `high` where they are known.

    Values that are not finite are left out.
    """
    values = [value for value in values if value - value == 0]
    if not values:
        return []
    means = _resample(values, 2 * width)
    low, high = min(means) if low is None else low, max(means) if high is None else high
    rows = 4 * height - 1
    scale = rows / (high - low) if high > low else 0.0
    cells = [[0] * width for _ in range(height)]
    previous = None
    for column, mean in enumerate(means):
        row = round((high - mean) * scale)
        # a steep step is drawn as a vertical line, or the curve falls apart into dots
        begin = row if previous is None else previous + (row > previous) - (row < previous)
        for y in range(min(begin, row), max(begin, row) + 1):
            cells[y // 4][column // 2] |= _BITS[column % 2][y % 4]
        previous = row
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    margin = max(len(label) for label in labels.values())
    return [
        f"{labels.get(y, ''):>{margin}} ┤{''.join(chr(0x2800 + bits) for bits in cells[y]).rstrip(chr(0x2800))}"
        for y in range(height)
    ]


def _resample(values: Sequence[float], n: int) -> list[float]:
    """`n` values of the same course: means of consecutive values where there are more, else linear in between."""
    if len(values) > n:
        ends = [column * len(values) // n for column in range(n + 1)]
        return [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(ends)]
    points = []
    for column in range(n):
        position = column * (len(values) - 1) / (n - 1)
        before = min(int(position), max(0, len(values) - 2))
        after = min(before + 1, len(values) - 1)
        points.append(values[before] + (position - before) * (values[after] - values[before]))
    return points
