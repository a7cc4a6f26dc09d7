"""The memory a pass would take: every plan, its terms, and the analysis that the idea rests on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentd.ctl import chart, output
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import CtlError, UsageError
from agentd.ctl.options import Json, Socket
from agentd.ctl.output import Column

if TYPE_CHECKING:
    from agentd.budget.equations import Point, Transformer

_PLANS = [
    Column("", "mark"),
    Column("method", "method"),
    Column("blocks", "blocks", right=True),
    Column("needs", "needed_bytes", right=True),
    Column("fits", "fits"),
    Column("short", "shortfall_bytes", right=True),
    Column("expected gain", "expected_gain", right=True),
    Column("takes", "seconds", right=True),
    Column("score", "score", right=True),
    Column("checkpoint", "checkpoint"),
]
TERMS = [
    Column("process", "process"),
    Column("term", "name"),
    Column("size", "bytes", right=True),
    Column("formula", "formula", wide=True, fold=True),
    Column("to make it smaller", "reduce", wide=True, fold=True),
]
_PAPER = [
    Column("vary", "symbol"),
    Column("value", "value", right=True),
    Column("BP", "bp_bytes", right=True),
    Column("BP, checkpointing", "bp_checkpointing_bytes", right=True),
    Column("MeZO", "mezo_bytes", right=True),
    Column("BP / MeZO", "ratio", right=True),
    Column("with checkpointing", "ratio_checkpointing", right=True),
]
_AXES = {"N": "context length N", "L": "layers L", "D": "hidden dimension D"}
_FORMATS = (".png", ".svg")


def budget(
    terms: Annotated[bool, typer.Option("--terms", help="The terms of the plan that a pass would take.")] = False,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="Only this one of those that the list has."),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=0, metavar="K", help="Only this number of blocks trained by BP.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every plan, not only the best with each number of blocks.")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The analysis of BP and MeZO instead (equations 1 to 3); needs no daemon.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw that analysis (Fig. 3) into a .png or .svg.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Model for --paper and --plot: a name, or a GGUF file."),
    ] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """The memory there is, what each plan would take of it, and which one a pass would take now and why."""
    if model is not None and not paper and plot is None:
        raise UsageError("--model goes with --paper or --plot")
    if plot is not None:
        _draw(plot, *_model(model, socket), as_json)
    elif paper:
        _paper(*_model(model or "llama-2-7b", socket), as_json)
    else:
        answer = Daemon(socket).get("/admin/budget", method=method, blocks=blocks)
        if as_json:
            output.document(answer)
        elif terms:
            _terms(answer)
        else:
            _plans(answer, every)


def _plans(answer: JSON, every: bool) -> None:
    chosen = _chosen(answer)
    plans = answer["plans"] if every else _best(answer["plans"], chosen)
    rows = [{**plan, "mark": "▶" if plan is chosen else ""} for plan in plans]
    if not output.on_terminal():
        output.listing([{**row, "mark": bool(row["mark"])} for row in rows], _PLANS)
        return
    reading = answer["reading"]
    bound = "" if reading["bound_by"] == "system" else f" (bound by {reading['bound_by']})"
    limit = "" if answer["limit_bytes"] is None else f", memory.limit {output.size(answer['limit_bytes'])}"
    print(
        f"{output.size(answer['available_bytes'])} available{bound}, {output.size(answer['reserve_bytes'])} kept free"
        f"{limit}: a pass may take {output.size(answer['budget_bytes'])}\n"
    )
    columns = [column for column in _PLANS if column.key != "checkpoint" or any(row["checkpoint"] for row in rows)]
    output.listing(rows, columns)
    print()
    if hidden := len(answer["plans"]) - len(rows):
        print(f"the best plan of each number of blocks; --all shows {hidden} more")
    print(output.clean(answer["why"]))
    if (backpropagation := answer.get("backpropagation")) and backpropagation["reason"]:
        blocks = backpropagation["most_blocks"] if backpropagation["supported"] else 0
        print(output.clean(f"backpropagation in the last {blocks} blocks at most: {backpropagation['reason']}"))
    if answer["workload"]["note"]:
        print(output.clean(answer["workload"]["note"]))
    for factor in answer["calibration"]:
        print(
            f"calibration: {factor['process']}, {factor['family']}: x {factor['factor']:.3f} "
            f"from {factor['passes']} passes"
        )


def _chosen(answer: JSON) -> JSON | None:
    """The plan that would be taken: the most preferred one that fits. Others may share its setting."""
    setting = answer["chosen"]
    if setting is None:
        return None
    same = [plan for plan in answer["plans"] if all(plan[name] == value for name, value in setting.items())]
    return next((plan for plan in same if plan["fits"]), None)


def _best(plans: Sequence[JSON], chosen: JSON | None) -> list[JSON]:
    """Of each number of blocks the most preferred plan that fits, or the most preferred one where none does."""
    best = {plan["blocks"]: plan for plan in reversed(plans)}
    best |= {plan["blocks"]: plan for plan in reversed(plans) if plan["fits"]}
    if chosen is not None:
        best[chosen["blocks"]] = chosen
    return [plan for plan in plans if any(plan is each for each in best.values())]


def _terms(answer: JSON) -> None:
    """Of the plan that would be taken; where none fits, of the smallest."""
    smallest = min(answer["plans"], key=lambda plan: int(plan["needed_bytes"]))
    plan = _chosen(answer) or smallest
    output.listing(plan["terms"], TERMS)
    if output.on_terminal():
        fits = "fits" if plan["fits"] else f"{output.size(plan['shortfall_bytes'])} short"
        print(f"\n{plan['method']}, {plan['blocks']} blocks: {output.size(plan['needed_bytes'])}, {fits}")


# --- the analysis


def _model(name: str | None, socket: Path | None) -> tuple[str, "Transformer"]:
    """A named model, a file's, or (without a name) the daemon's, in the symbols of the equations."""
    from agentd.budget.equations import NAMED, Transformer

    if name is None:
        shapes = Daemon(socket).get("/admin/budget")["model"]
        symbols = {"L": "n_layer", "D": "n_embd", "H": "n_head", "V": "n_vocab", "N": "context"}
        return shapes["name"], Transformer(**{symbol: int(shapes[key]) for symbol, key in symbols.items()})
    if name in NAMED:
        return name, NAMED[name]
    path = Path(name)
    if not path.exists():
        raise UsageError(f"there is no file {name!r} and no model of that name; named ones: {', '.join(NAMED)}")
    from agentd.budget.model_shapes import ModelShapes
    from agentd.errors import AgentdError
    from agentd.formats.gguf_header import read_header

    try:
        header = read_header(path)
    except AgentdError as error:
        raise CtlError(str(error)) from None
    return path.stem, ModelShapes.from_header(header).in_symbols(header.context_length or 2048)


def _paper(name: str, m: "Transformer", as_json: bool) -> None:
    from agentd.budget.equations import LLAMA_2_7B, SWEPT, figure_3, sweep

    rows: list[dict[str, Any]] = []
    for symbol, values in SWEPT.items():
        for point in sweep(m, symbol, sorted({*values, getattr(m, symbol)})):
            rows.append({"symbol": symbol} | point.as_json())
    if as_json:
        output.document({"model": {"name": name} | _symbols(m), "rows": rows})
        return
    if output.on_terminal():
        print(f"{name}: " + ", ".join(f"{symbol}={value:g}" for symbol, value in _symbols(m).items()) + "\n")
    output.listing([_gigabytes(row) if output.on_terminal() else row for row in rows], _PAPER)
    if not output.on_terminal():
        return
    if m == LLAMA_2_7B:
        print("\nThe paper quotes up to 25x (5x with checkpointing) for long contexts, 4.23x to 4.38x for deep models")
        print("(2.28x, 2.17x, 2x with checkpointing), 24x (5x) for narrow ones and 2x for wide ones.")
    for symbol, points in figure_3(m, 2 * chart_width()).items():
        _chart(f"BP / MeZO against {_AXES[symbol]}", points)


def chart_width() -> int:
    return 60


def _chart(title: str, points: Sequence["Point"]) -> None:
    print(f"\n{title}, {points[0].value} to {points[-1].value} (logarithmic)")
    for line in chart.line([point.ratio for point in points], chart_width()):
        print(line)


def _symbols(m: "Transformer") -> dict[str, Any]:
    return {name: getattr(m, name) for name in ("N", "L", "D", "H", "V", "B", "b")} | {"L'": m.L_kept}


def _gigabytes(row: dict[str, Any]) -> dict[str, Any]:
    """GB of 10^9 bytes, as the paper has them."""
    sizes = {name: f"{value / 1e9:.2f} GB" for name, value in row.items() if name.endswith("_bytes")}
    ratios = {name: f"{row[name]:.3f}" for name in ("ratio", "ratio_checkpointing")}
    return {**row, **sizes, **ratios}


def _draw(path: Path, name: str, m: "Transformer", as_json: bool) -> None:
    from agentd.budget.figure import PlottingUnavailable, draw

    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--plot writes {' or '.join(_FORMATS)} files, not {path.name!r}")
    try:
        draw(path, name, m)
    except PlottingUnavailable as error:
        raise CtlError(str(error)) from None
    except OSError as error:
        raise CtlError(f"cannot write {path}: {error.strerror or error}") from None
    if as_json:
        output.document({"model": {"name": name} | _symbols(m), "file": str(path)})
    else:
        output.say(f"drew {path}")
