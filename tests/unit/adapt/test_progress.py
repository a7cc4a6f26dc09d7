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
