"""What commands print: a table on a terminal, TSV in a pipe, the daemon's own JSON on request.

rich is imported only where something is drawn on a terminal.
"""

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Column:
    """A column of a list. `key` is a dotted path into the object; `wide` columns give way on a narrow terminal,
    by an ellipsis or, with `fold`, by taking more lines."""

    title: str
    key: str
    right: bool = False
    wide: bool = False
    fold: bool = False


def on_terminal() -> bool:
    return sys.stdout.isatty()


def console() -> "Console":
    """A terminal to draw on; rich itself honours NO_COLOR and COLUMNS."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def document(answer: object) -> None:
    """Prints JSON: indented for a person, on one line for a program."""
    print(_dumps(answer, indent=2 if on_terminal() else None))


def line(answer: object) -> None:
    """Prints one JSON object on a line of its own, at once."""
    print(_dumps(answer), flush=True)


def listing(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, empty: str = "nothing yet") -> None:
    """Prints a list: a table on a terminal, else one line of tab-separated raw values per row, without a header."""
    if not on_terminal():
        for row in rows:
            print("\t".join(raw(pick(row, column.key)) for column in columns))
        return
    if not rows:
        print(empty)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=not column.wide)
    for row in rows:
        cells = [(column.fold, clean(human(column.key, pick(row, column.key)), lines=False)) for column in columns]
        table.add_row(*(Text(cell, no_wrap=not fold, overflow="fold" if fold else "ellipsis") for fold, cell in cells))
    console().print(table)


def facts(tree: Mapping[str, Any]) -> None:
    """Prints one object as names and values; nested objects get dotted names. Raw values in a pipe."""
    pairs = list(flatten(tree))
    if not on_terminal():
        for name, value in pairs:
            print(f"{name}\t{raw(value)}")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(clean(name, lines=False), Text(clean(human(name, value))))
    console().print(table)


def show(answer: Mapping[str, Any], as_json: bool) -> None:
    """Prints what the daemon answered: its own JSON on request, else `facts`."""
    document(answer) if as_json else facts(answer)


def say(message: str) -> None:
    """One line for a person on stderr, so that stdout stays fit for a program."""
    print(clean(message, lines=False), file=sys.stderr, flush=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested objects as (dotted name, value); empty objects and absent values are left out."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def pick(row: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted path, or None where the path ends early."""
    value: Any = row
    for name in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def raw(value: object) -> str:
    """A value as one TSV field: nothing for null, true and false in lower case, tabs and newlines escaped."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    for character, escape in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, escape)
    return text


def human(key: str, value: object) -> str:
    """A value as a person reads it. The name of a quantity ends in its unit: bytes, seconds or ms."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for suffix, show in _UNITS.items():
        if number and (key.endswith(suffix) or f"{suffix}." in key):
            return show(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size(n_bytes: float) -> str:
    """Bytes in binary units, as the configuration writes them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


_UNITS: dict[str, Callable[[Any], str]] = {
    "bytes": size,
    "seconds": duration,
    "seconds_left": duration,
    "_ms": lambda value: f"{value:.1f} ms",
    "memory.processes": size,
    "phases": duration,
    "peaks": size,
    "predicted": size,
}


def _dumps(answer: object, indent: int | None = None) -> str:
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(answer, ensure_ascii=not unicode, indent=indent)


def clean(text: str, *, lines: bool = True) -> str:
    """Text from a model or a user, without what a terminal would obey (escape sequences); `lines` keeps newlines."""
    allowed = "\n\t" if lines else ""
    text = text if lines else " ".join(text.split())
    return "".join(c if c in allowed or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)
