from typing import Any

import pytest

from tools import home
from tools.demo.simulated_home import HomeError, SimulatedHome


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_right_call_can_be_done(split: str) -> None:
    simulated = SimulatedHome()
    for row in home.commands(split):
        assert simulated.run(row["name"], row["arguments"])


def on(simulated: SimulatedHome) -> set[tuple[str, str]]:
    return {place for place, state in simulated.on.items() if state}


def test_tools_change_what_they_name() -> None:
    simulated = SimulatedHome()
    assert simulated.run("HassTurnOn", {"area": "kitchen", "domain": "light"}) == "kitchen: lights on"
    assert on(simulated) == {("kitchen", "light")}
    assert simulated.run("HassTurnOff", {"domain": "light"}) == "everywhere: lights off"
    assert not on(simulated)
    assert simulated.run("HassTurnOn", {"name": "front door"}) == "front door: locked"
    assert simulated.run("HassTurnOff", {"name": "garage door"}) == "garage door: closed"
    assert simulated.run("HassLightSet", {"area": "office", "brightness": 30, "color": "red"}) == (
        "office: lights red at 30 %"
    )
    assert on(simulated) == {("office", "light")}
    assert simulated.run("HassClimateSetTemperature", {"area": "bedroom", "temperature": 18}) == (
        "bedroom: heating at 18 °C"
    )
    assert simulated.heating["bedroom"] == 18
    assert simulated.run("HassStartTimer", {"name": "tea", "minutes": 4, "seconds": 30}) == "tea: rings in 0:04:30"
    assert simulated.timers == [("tea", 270)]
    simulated.run("HassShoppingListAddItem", {"item": "milk"})
    assert simulated.run("HassShoppingListAddItem", {"item": "eggs"}) == "shopping list: milk, eggs"


@pytest.mark.parametrize(
    ("tool", "arguments", "complaint"),
    [
        ("HassFly", {}, "no tool HassFly"),
        ("HassTurnOn", {}, "missing"),
        ("HassTurnOn", {"name": "elevator"}, "no elevator"),
        ("HassLightSet", {"area": "kitchen"}, "missing"),
        ("HassLightSet", {"area": "kitchen", "brightness": 400}, "0 to 100"),
        ("HassLightSet", {"brightness": 40}, "no room None"),
        ("HassClimateSetTemperature", {"temperature": 20}, "no room"),
        ("HassStartTimer", {"name": "tea"}, "needs a time"),
    ],
)
def test_what_cannot_be_done_changes_nothing(tool: str, arguments: dict[str, Any], complaint: str) -> None:
    simulated, untouched = SimulatedHome(), SimulatedHome()
    with pytest.raises(HomeError, match=complaint):
        simulated.run(tool, arguments)
    assert vars(simulated) == vars(untouched)
