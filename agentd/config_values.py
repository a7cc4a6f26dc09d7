"""What a value of the configuration may be: quantities with their units, numbers within bounds, names, addresses.

Every one of these makes a parser, which raises ValueError or TypeError with a sentence for whoever wrote the value.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SIZE = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_TIME = {"": 1.0, "S": 1.0, "MS": 1e-3, "M": 60.0, "MIN": 60.0, "H": 3600.0, "D": 86400.0}


def _quantity(units: Mapping[str, float], example: str) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
        if isinstance(value, bool) or match is None or match[2].upper() not in units:
            raise ValueError(f"{value!r} is not a quantity such as {example}")
        return float(match[1]) * units[match[2].upper()]

    return parse


duration = _quantity(_TIME, "30s, 5m, 12h or 90d")  # in seconds
_bytes = _quantity(_SIZE, "256MiB or 1.5GiB")


def size(value: Any) -> int:
    return int(_bytes(value))


def path(value: Any) -> Path:
    return Path(os.path.expandvars(str(value))).expanduser()


def number(low: float, high: float, kind: type = float) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a number")
        number = kind(value)
        if not low <= number <= high:
            raise ValueError(f"{value!r} is not between {low} and {high}")
        return number

    return parse


def auto(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value if value == "auto" else parse(value)


def one_of(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"{value!r} is not one of {', '.join(names)}")
        return str(value)

    return parse


def quiet_hours(value: Any) -> str:
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", str(value)):
        raise ValueError(f"{value!r} is not a span such as 22:00-07:00")
    return str(value)


def loopback(value: Any) -> str:
    match = re.fullmatch(r"(127\.\d+\.\d+\.\d+|localhost|\[::1\]):(\d{1,5})", str(value))
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f"{value!r} is not a loopback address such as 127.0.0.1:8080")
    return str(value)


def boolean(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"{value!r} is neither true nor false")
    return str(value).lower() == "true"
