"""Temperature and battery, read where the kernel puts them: /sys/class/hwmon, thermal and power_supply.

Sensors are chosen by what they measure. Many boards have some that say nothing about the processor: a power chip that
reads 100 °C for ever (PMIC-Die of several Jetsons), inputs with nothing connected (127 °C), radios, disks, and the
batteries of mice and keyboards.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_PROCESSOR = re.compile(
    r"cpu|core|soc|package|pkg|tctl|tdie|gpu|npu|\bapu|k10temp|zenpower|cluster|tj\b|bcm2835|bigcore|littlecore|ddr",
    re.I,
)
_OTHER = re.compile(
    r"pmic|batt?\b|bat\d|charg|wi-?fi|wlan|wl\d|iwl|ath\d|mt7|phy|nvme|drive|disk|sata|sfp|ambient|skin|psu|usb|hid",
    re.I,
)
_IMPOSSIBLE = 125.0  # °C, from which on a processor would have switched itself off, and inputs are not connected
_CONSTANT_AFTER = 120  # readings that are all the same: with one in 5 s, ten minutes


@dataclass(frozen=True)
class Sensors:
    """The hottest sensor in °C and its name, the battery's charge in percent and whether it is being charged or the
    mains are there. None where the device has no such thing."""

    temperature: float | None = None
    battery: float | None = None
    plugged: bool | None = None
    hottest: str | None = None


class SensorReader:
    """Remembers which sensors have never changed: those are stuck, and left out after a while."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._root = root
        self._first: dict[str, tuple[float, int]] = {}  # the first value, and how often it was read; -1: has changed

    def read(self, only: str | None = None) -> Sensors:
        """Everything now. `only` names the one sensor whose temperature counts. Never raises OSError."""
        temperatures = dict(_temperatures(self._root))
        moving = {name: value for name, value in temperatures.items() if not self._is_stuck(name, value)}
        chosen = {only: temperatures[only]} if only in temperatures else _of_the_processor(moving)
        hottest = max(chosen, key=lambda name: chosen[name], default=None)
        charge, plugged = _battery(self._root)
        return Sensors(chosen[hottest] if hottest else None, charge, plugged, hottest)

    def _is_stuck(self, name: str, value: float) -> bool:
        first, times = self._first.get(name, (value, 0))
        times = times + 1 if times >= 0 and value == first else -1
        self._first[name] = first, times
        return times > _CONSTANT_AFTER


def _of_the_processor(temperatures: dict[str, float]) -> dict[str, float]:
    """Those of the processor; where none says so, all that do not say to be of something else."""
    rest = {name: value for name, value in temperatures.items() if not _OTHER.search(name)}
    return {name: value for name, value in rest.items() if _PROCESSOR.search(name)} or rest


def _temperatures(root: Path) -> Iterator[tuple[str, float]]:
    """Name and °C of every sensor that reads something possible. Two of one name count as the hotter one."""
    highest: dict[str, float] = {}
    places = [(path, path.with_name("type")) for path in sorted(root.glob("sys/class/thermal/thermal_zone*/temp"))]
    for path in sorted(root.glob("sys/class/hwmon/hwmon*/temp*_input")):
        places.append((path, path.with_name(path.name.replace("_input", "_label"))))
    for path, label in places:
        chip = _text(path.with_name("name")) if "hwmon" in path.parts else ""
        name = " ".join(part for part in (chip, _text(label)) if part) or path.parent.name
        with suppress(ValueError):
            value = float(_text(path))
            if value >= _IMPOSSIBLE:  # thousandths, but for some vendors' kernels, which have whole degrees
                value /= 1000
            if 0 < value < _IMPOSSIBLE:
                highest[name] = max(value, highest.get(name, value))
    yield from highest.items()


def _battery(root: Path) -> tuple[float | None, bool | None]:
    """Charge in percent of the emptiest battery that feeds the system, and whether mains do."""
    charges, states, mains = [], [], []
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        kind = _text(supply / "type")
        if _text(supply / "scope") == "Device":  # a mouse's
            continue
        if kind == "Battery" and _text(supply / "present") != "0":
            with suppress(ValueError):
                charges.append(float(_text(supply / "capacity")))
                states.append(_text(supply / "status"))
        elif kind and kind != "Battery" and (online := _text(supply / "online")):
            mains.append(online != "0")
    if not charges:
        return None, None
    if any(mains) or any(state in ("Charging", "Full") for state in states):
        return min(charges), True
    return min(charges), False if mains or "Discharging" in states else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""  # not there, asleep or broken
