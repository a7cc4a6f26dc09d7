"""A table's row as a frozen dataclass, and its way into and out of SQLite."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_origin

from sqlite_utils import Database

R = TypeVar("R", bound="Row")


@dataclass(frozen=True)
class Row:
    """Fields are columns: `dict`, `list` and `Any` fields are JSON text in the database, `bool` fields integers."""

    table: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """The row as the admin API shows it: the columns, by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, unescaped. JSON has no NaN and no infinity; they become null."""
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return to_json(json.loads(json.dumps(value), parse_constant=lambda _: None))


def columns(kind: type[Row], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of some of `kind`'s fields as SQLite stores them. Raises ValueError for names that are no columns."""
    types = {field.name: field.type for field in fields(kind)}
    if unknown := values.keys() - types.keys():
        raise ValueError(f"{kind.table} has no columns {', '.join(sorted(unknown))}")
    return {name: to_json(value) if _is_json(types[name]) else value for name, value in values.items()}


def insert(db: Database, row: Row) -> int:
    """Inserts the row and returns its rowid; a field `id` that is None is left to SQLite."""
    values = columns(type(row), row.as_json())
    names, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
    rowid = db.execute(f"INSERT INTO {row.table} ({names}) VALUES ({marks})", values).lastrowid
    assert rowid is not None
    return rowid


def select(db: Database, kind: type[R], rest: str = "", parameters: Sequence[Any] = ()) -> list[R]:
    """The rows of `kind`'s table that the rest of the statement (WHERE, ORDER BY, LIMIT) leaves."""
    decode = {field.name: _decoder(field.type) for field in fields(kind)}
    rows = db.query(f"SELECT * FROM {kind.table} {rest}", parameters)
    return [kind(**{name: decode[name](value) for name, value in values.items()}) for values in rows]


def where(**conditions: Any) -> tuple[str, list[Any]]:
    """A WHERE clause of the equalities whose value is not None, with its parameters."""
    values = {name: value for name, value in conditions.items() if value is not None}
    clause = " AND ".join(f"{name} = ?" for name in values)
    return (f"WHERE {clause}" if clause else ""), list(values.values())


def _is_json(kind: Any) -> bool:
    return kind is Any or get_origin(kind) in (dict, list)


def _decoder(kind: Any) -> Any:
    if _is_json(kind):
        return json.loads
    return bool if kind is bool else lambda value: value
