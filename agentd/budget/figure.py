"""Fig. 3 of the paper for any model: memory of BP and MeZO, and their ratio, against N, L and D.

matplotlib is no dependency of agentd; it comes with the extra `plot`.
"""

from pathlib import Path
from typing import Any

from agentd.budget.equations import Point, Transformer, figure_3

_AXES = {"N": "context length N (tokens)", "L": "layers L", "D": "hidden dimension D"}
_STYLES = {
    "BP": ("backpropagation", "#b2182b", "-"),
    "BP, checkpointing": ("checkpointed", "#ef8a62", "--"),
    "MeZO": ("mezo", "#2166ac", "-"),
}


class PlottingUnavailable(Exception):
    """matplotlib is not installed."""

    def __init__(self) -> None:
        super().__init__("drawing needs matplotlib, which is not installed: pip install 'agentd[plot]'")


def draw(path: Path, name: str, m: Transformer) -> None:
    """Writes the six panels to `path`, in the format its suffix names. Raises PlottingUnavailable, OSError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlottingUnavailable from None
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for column, (symbol, points) in enumerate(figure_3(m).items()):
        _memory(axes[0][column], points)
        _ratio(axes[1][column], points)
        for panel in (axes[0][column], axes[1][column]):
            panel.axvline(getattr(m, symbol), color="0.6", linewidth=0.8, linestyle=":")
            panel.set_xscale("log", base=10 if symbol == "L" else 2)
            panel.set_xlabel(_AXES[symbol])
            panel.grid(True, which="major", color="0.9")
    axes[0][0].set_ylabel("memory (GB)")
    axes[1][0].set_ylabel("BP / MeZO")
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{name}: N={m.N}, L={m.L}, D={m.D}, H={m.H}, V={m.V}, B={m.B}, b={m.b:g}, L'={m.L_kept:g}")
    # No date in the file, so that the same figure is the same bytes.
    metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
    figure.savefig(path, dpi=150, metadata=metadata)


def _memory(panel: Any, points: list[Point]) -> None:
    for label, (attribute, colour, style) in _STYLES.items():
        sizes = [getattr(point, attribute) / 1e9 for point in points]
        panel.plot([point.value for point in points], sizes, style, color=colour, label=label)
    panel.set_yscale("log")


def _ratio(panel: Any, points: list[Point]) -> None:
    values = [point.value for point in points]
    panel.plot(values, [point.ratio for point in points], "-", color=_STYLES["BP"][1])
    panel.plot(values, [point.ratio_checkpointed for point in points], "--", color=_STYLES["BP, checkpointing"][1])
    panel.set_ylim(bottom=0)
