"""How fast an engine is, while others ask it something or not."""

import asyncio

from agentd.adapt.planning.engine_speed import fastest


def measured(rates: list[float], others: list[int], own: int = 0) -> tuple[float, int]:
    """The speed out of measurements that give these, beside which so many requests of others come; and the tries."""
    came = tries = 0

    async def measure() -> float:
        nonlocal came, tries
        came += own + others[tries]
        tries += 1
        return rates[tries - 1]

    return asyncio.run(fastest(measure, lambda: came, own)), tries


def test_an_idle_engine_is_measured_once() -> None:
    assert measured([50.0, 90.0, 90.0], [0, 0, 0]) == (50.0, 1)
    assert measured([50.0, 90.0, 90.0], [0, 0, 0], own=1) == (50.0, 1)


def test_what_was_measured_beside_requests_is_measured_again() -> None:
    assert measured([20.0, 50.0, 90.0], [3, 0, 0]) == (50.0, 2)
    assert measured([20.0, 35.0, 30.0], [3, 2, 1], own=1) == (35.0, 3)
