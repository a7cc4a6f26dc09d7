import asyncio
import contextlib

from agentd.adapt.passes.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_time_left_follows_the_pace() -> None:
    clock = Clock()
    progress = Progress(7, clock=clock)
    clock.now += 2
    progress.begin("tap", 10)
    assert progress.as_json()["seconds_left"] is None
    clock.now += 4
    progress.step = 4
    assert progress.seconds_left == 6.0
    progress.begin("train", 5)
    clock.now += 1
    progress.begin("tap", 3)
    clock.now += 1
    progress.finish("committed", None)
    assert progress.phases == {"plan": 2.0, "tap": 5.0, "train": 1.0}
    clock.now += 100
    assert progress.seconds == 8.0
    tree = progress.as_json()
    assert tree["done"]
    assert (tree["state"], tree["outcome"], tree["seconds"], tree["seconds_left"]) == (
        "committed",
        "committed",
        8.0,
        None,
    )


def test_a_pass_is_told_to_end_once() -> None:
    """Another cancellation would come into what it does about the first one, and leave it half done."""

    async def run(progress: Progress, *, over: bool = False) -> list[str]:
        noted: list[str] = []

        async def work() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05 if over else 60)
            await asyncio.sleep(0.05)
            noted.append(str(progress.stop_reason))

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        if over:
            progress.finish("failed", "it could not go on")
        for reason in ("cancelled by the owner", "rolled back by the owner"):
            progress.end(task, reason)
            await asyncio.sleep(0.01)
        await asyncio.wait({task})
        return noted

    assert asyncio.run(run(Progress(1))) == ["cancelled by the owner"]
    assert asyncio.run(run(Progress(2), over=True)) == ["None"]
