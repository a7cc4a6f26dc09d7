"""Types of configuration values: quantities with their units, texts, addresses.

Each turns what YAML or an environment variable holds into a Python value, and raises ValueError with a sentence for
whoever wrote it. Bounds are given where a type is used.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Strict

_SIZE = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SHARES = ("ledger", "adapter", "figures")  # what may leave a board for its fleet
_TIME = {"": 1.0, "S": 1.0, "MS": 1e-3, "M": 60.0, "MIN": 60.0, "H": 3600.0, "D": 86400.0}


def _quantity(units: Mapping[str, float], example: str) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
        if isinstance(value, bool) or match is None or match[2].upper() not in units:
            raise ValueError(f"{value!r} is not a quantity such as {example}")
        return float(match[1]) * units[match[2].upper()]

    return parse


_bytes = _quantity(_SIZE, "256MiB or 1.5GiB")


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # Python counts True as 1
        raise ValueError(f"{value!r} is not a number")
    return value


def _text(value: Any) -> str:
    """YAML 1.1 reads a bare yes, 12:30, 010, 1_000, null or 2024-01-01 as something else, and its text is gone."""
    if not isinstance(value, str):
        raise ValueError(f"YAML reads this as {value!r}, which is no text; quote it")
    return value


def _names(value: Any) -> tuple[str, ...]:
    """A list of texts; in the environment one text with commas."""
    listed = value.split(",") if isinstance(value, str) else value
    if listed is None:
        return ()
    if not isinstance(listed, list | tuple):
        raise ValueError(f"{value!r} is no list of names")
    names = [_text(each).strip() for each in listed]
    for name in names:
        if not (0 < len(name) <= 200 and name.isprintable()):
            raise ValueError(f"{name!r} is no name of 1 to 200 characters that can be seen")
    return tuple(dict.fromkeys(names))


def _shares(value: Any) -> tuple[str, ...]:
    names = _names(value)
    for name in names:
        if name not in SHARES:
            raise ValueError(f"{name!r} is none of {', '.join(SHARES)}")
    return names


def _path(value: Any) -> Path:
    return Path(os.path.expandvars(str(value))).expanduser()


def _boolean(value: Any) -> Any:
    return {"true": True, "false": False}.get(str(value).lower(), value)


def _switch(value: Any) -> Any:
    """YAML 1.1 reads a bare on or off as true or false."""
    if isinstance(value, bool) or value in ("true", "false"):
        return "on" if value in (True, "true") else "off"
    return value


def _quiet_hours(value: Any) -> str:
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", str(value)):
        raise ValueError(f"{value!r} is not a span such as 22:00-07:00")
    start, end = str(value).split("-")
    if start == end:
        raise ValueError(f"{value!r} begins when it ends; adapt.enabled: false lets no pass start by itself at all")
    return str(value)


def _address(value: Any) -> str:
    host, colon, port = str(value).rpartition(":")
    literal = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    version: int
    try:
        version = 4 if host == "localhost" else ipaddress.ip_address(literal).version
    except ValueError:
        version = 0
    if not colon or version != (6 if literal != host else 4) or not re.fullmatch(r"\d{1,5}", port):
        raise ValueError(f"{value!r} is not an address such as 127.0.0.1:8080, 0.0.0.0:8080 or [::1]:8080")
    if not 0 < int(port) < 65536:
        raise ValueError(f"{value!r}: there is no port {port}")
    return str(value)


def is_loopback(address: str) -> bool:
    """Whether only programs on this machine reach what listens at this HOST:PORT."""
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def _origins(value: Any) -> tuple[str, ...]:
    origins = _names(value)
    for origin in origins:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#@*]+", origin):  # apps and extensions have their own
            raise ValueError(f"{origin!r} is no origin such as https://chat.example:3000 (no path, no *)")
    return tuple(re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", origin.lower()) for origin in origins)


def _url(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", value):
        raise ValueError(f"{value!r} is no address such as http://127.0.0.1:4318 (http or https, no user, no query)")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Size = Annotated[int, BeforeValidator(lambda value: int(_bytes(value)))]  # bytes
Duration = Annotated[float, BeforeValidator(_quantity(_TIME, "30s, 5m, 12h or 90d"))]  # seconds
Boolean = Annotated[bool, Strict(), BeforeValidator(_boolean)]
Switch = Annotated[Literal["off", "on", "auto"], BeforeValidator(_switch)]
Text = Annotated[str, BeforeValidator(_text)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Shares = Annotated[tuple[str, ...], BeforeValidator(_shares)]  # of SHARES
File = Annotated[Path, BeforeValidator(_path)]  # ~ and $VARIABLES are expanded
QuietHours = Annotated[str, BeforeValidator(_quiet_hours)]  # HH:MM-HH:MM
Address = Annotated[str, BeforeValidator(_address)]  # HOST:PORT
Origins = Annotated[tuple[str, ...], BeforeValidator(_origins)]  # as browsers send them in Origin
Url = Annotated[str, BeforeValidator(_url)]  # http(s)://HOST[:PORT][/PATH]
