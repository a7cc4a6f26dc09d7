"""Messages between the daemon and its engine: one JSON object a line over a socket pair.

To the engine: {"id": n, "op": name, "arguments": {...}}. From it, any number of {"id": n, "progress": value} and one of
{"id": n, "result": value} or {"id": n, "error": {...}}; and {"pieces": [...]} for requests being served. Here alone
operations and their results become JSON and back; types say how.
"""

import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from agentd import errors
from agentd.engine import operations
from agentd.engine.operations import Operation, P, R
from agentd.engine.protocol import CallDelta, Piece
from agentd.errors import AgentdError

LIMIT = 1 << 28  # bytes of one message

_OPERATIONS = {
    name: kind for name, kind in vars(operations).items() if isinstance(kind, type) and issubclass(kind, Operation)
}


def pack(message: dict[str, Any]) -> bytes:
    """A message as a line. Dataclasses in it become objects, paths texts."""
    # A lone surrogate in a request must reach whoever refuses it; json.loads takes it back from bytes like these.
    return _ENCODER.encode(message).encode("utf-8", "surrogatepass") + b"\n"


def pieces(pieces: Sequence[Piece]) -> bytes:
    """A message of what came out of a step; what a piece does not say is left out of it."""
    return pack({"pieces": [{k: v for k, v in vars(piece).items() if v != _EMPTY.get(k)} for piece in pieces]})


def piece(tree: dict[str, Any]) -> Piece:
    """A piece of such a message."""
    if "calls" in tree:
        tree["calls"] = tuple(CallDelta(**call) for call in tree["calls"])
    return Piece(**tree)


def command(number: int, operation: Operation[Any, Any]) -> bytes:
    return pack({"id": number, "op": type(operation).__name__, "arguments": operation})


def operation(message: dict[str, Any]) -> Operation[Any, Any]:
    """The operation of a message that `command` made."""
    request: Operation[Any, Any] = reader(_OPERATIONS[message["op"]])(message["arguments"])
    return request


def result(operation: Operation[R, Any], tree: Any) -> R:
    """What an operation returned, from a message."""
    value: R = reader(_parameters(type(operation))[0])(tree)
    return value


def progress(operation: Operation[Any, P], tree: Any) -> P:
    """What an operation reported, from a message."""
    value: P = reader(_parameters(type(operation))[1])(tree)
    return value


def reader(hint: Any) -> Callable[[Any], Any]:
    """Makes values of a type from what JSON makes of them."""
    if hint not in _readers:
        _readers[hint] = _make_reader(hint)
    return _readers[hint]


_readers: dict[Any, Callable[[Any], Any]] = {}


def _make_reader(hint: Any) -> Callable[[Any], Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Path:
        return Path
    if isinstance(hint, type) and is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        members = {field.name: reader(hints[field.name]) for field in fields(hint)}
        return lambda tree: hint(**{name: members[name](value) for name, value in tree.items()})
    if origin in (UnionType, typing.Union):
        (kind,) = set(arguments) - {type(None)}
        inner = reader(kind)
        return lambda tree: None if tree is None else inner(tree)
    if origin is list:
        each = reader(arguments[0])
        return _as_it_is if each is _as_it_is else lambda tree: [each(value) for value in tree]
    if origin is tuple and arguments[-1] is Ellipsis:
        each = reader(arguments[0])
        return lambda tree: tuple(each(value) for value in tree)
    if origin is tuple:
        places = [reader(argument) for argument in arguments]
        return lambda tree: tuple(read(value) for read, value in zip(places, tree, strict=True))
    return _as_it_is


def _parameters(cls: type[Operation[Any, Any]]) -> tuple[Any, Any]:
    """(type of the result, type of progress) of an operation's class."""
    (base,) = cls.__orig_bases__  # type: ignore[attr-defined]  # typing sets it
    parameters = typing.get_args(base)
    return parameters[0], parameters[1] if len(parameters) > 1 else None


def _as_it_is(tree: Any) -> Any:
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return vars(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain)
_EMPTY = {name: value for name, value in vars(Piece("")).items() if name != "key"}


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as data."""
    if isinstance(error, AgentdError):
        known = {"class": type(error).__name__, "type": error.type, "code": error.code, "status": error.status}
        return {"message": str(error), "param": getattr(error, "param", None), **known}
    return {"message": f"{type(error).__name__}: {error}", "class": "AgentdError"}


def revive(described: dict[str, Any]) -> AgentdError:
    """The exception that `describe` described, as far as the daemon's handlers tell them apart."""
    cls = getattr(errors, str(described.get("class")), AgentdError)
    if not (isinstance(cls, type) and issubclass(cls, AgentdError)):
        cls = AgentdError
    error: AgentdError = cls.__new__(cls)
    Exception.__init__(error, described["message"])
    for name in ("type", "code", "status", "param"):
        if described.get(name) is not None:
            setattr(error, name, described[name])
    return error
