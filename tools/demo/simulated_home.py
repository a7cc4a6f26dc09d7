"""A home in memory, which the tools of tools/home.py change."""

from collections.abc import Mapping
from typing import Any

from tools.home import AREAS, DEVICES, DOMAINS

_STATES = {"cover": ("closed", "open"), "lock": ("unlocked", "locked")}  # of others: off, on


class HomeError(Exception):
    """The home cannot do that; the message is for whoever asked."""


class SimulatedHome:
    """Rooms with lights, fans and heating, devices with a name, timers and a shopping list."""

    def __init__(self) -> None:
        self.on: dict[tuple[str, str], bool] = {(area, domain): False for area in AREAS for domain in DOMAINS}
        self.brightness = dict.fromkeys(AREAS, 100)
        self.color = dict.fromkeys(AREAS, "white")
        self.heating = dict.fromkeys(AREAS, 20)
        self.devices = dict.fromkeys(DEVICES, False)
        self.timers: list[tuple[str, int]] = []  # names and seconds
        self.shopping: list[str] = []

    def run(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Does what a call says; returns what is different now. Raises HomeError, having changed nothing."""
        match tool:
            case "HassTurnOn" | "HassTurnOff":
                return self._switch(arguments, tool == "HassTurnOn")
            case "HassLightSet":
                return self._light(arguments)
            case "HassClimateSetTemperature":
                area = _area(arguments)
                self.heating[area] = int(arguments["temperature"])
                return f"{area}: heating at {self.heating[area]} °C"
            case "HassStartTimer":
                return self._timer(arguments)
            case "HassShoppingListAddItem":
                self.shopping.append(str(arguments["item"]))
                return f"shopping list: {', '.join(self.shopping)}"
            case _:
                raise HomeError(f"there is no tool {tool}")

    def _switch(self, arguments: Mapping[str, Any], on: bool) -> str:
        if name := arguments.get("name"):
            if name not in self.devices:
                raise HomeError(f"there is no {name}")
            self.devices[name] = on
            return f"{name}: {_STATES.get(DEVICES[name], ('off', 'on'))[on]}"
        if not arguments.keys() & {"area", "domain"}:
            raise HomeError("a name, an area or a domain is missing")
        areas = [_area(arguments)] if "area" in arguments else AREAS
        domains = [arguments["domain"]] if "domain" in arguments else DOMAINS
        for area in areas:
            for domain in domains:
                self.on[area, domain] = on
        where = areas[0] if len(areas) == 1 else "everywhere"
        return f"{where}: {' and '.join(f'{domain}s' for domain in domains)} {'on' if on else 'off'}"

    def _light(self, arguments: Mapping[str, Any]) -> str:
        area = _area(arguments)
        if not arguments.keys() & {"brightness", "color"}:
            raise HomeError("a brightness or a color is missing")
        brightness = int(arguments.get("brightness", self.brightness[area]))
        if not 0 <= brightness <= 100:
            raise HomeError("a brightness is from 0 to 100")
        self.on[area, "light"] = brightness > 0
        self.brightness[area], self.color[area] = brightness, str(arguments.get("color", self.color[area]))
        return f"{area}: lights {self.color[area]} at {brightness} %"

    def _timer(self, arguments: Mapping[str, Any]) -> str:
        seconds = sum(int(arguments.get(unit, 0)) * n for unit, n in (("hours", 3600), ("minutes", 60), ("seconds", 1)))
        if seconds <= 0:
            raise HomeError("a timer needs a time")
        name = str(arguments.get("name", "timer"))
        self.timers.append((name, seconds))
        return f"{name}: rings in {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _area(arguments: Mapping[str, Any]) -> str:
    area = arguments.get("area")
    if area not in AREAS:
        raise HomeError(f"there is no room {area!r}")
    return str(area)
