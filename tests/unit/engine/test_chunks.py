"""Where prompts are cut: fixed places, so that what can be taken over from another prompt does not depend on either."""

import pytest

from agentd.engine.chunks import Cuts


@pytest.mark.parametrize(
    ("cuts", "length", "pieces"),
    [
        (Cuts(), 20, [20]),
        (Cuts(), 100, [32, 32, 32, 4]),
        (Cuts(), 600, [32, 32, 32, 32, 64, 64, 256, 88]),
        (Cuts((64, 128)), 100, [64, 36]),
        (Cuts((64, 128)), 300, [64, 64, 128, 44]),
    ],
)
def test_the_pieces_of_a_prompt(cuts: Cuts, length: int, pieces: list[int]) -> None:
    sizes, at = [], 0
    while at < length:
        stop = min(cuts.after(at), length)
        sizes.append(stop - at)
        at = stop
    assert sizes == pieces
    assert max(sizes) <= cuts.longest


@pytest.mark.parametrize("cuts", [Cuts(), Cuts((64, 128))])
def test_what_can_be_reused_ends_at_a_cut(cuts: Cuts) -> None:
    places = {0}
    while max(places) < 1000:
        places.add(cuts.after(max(places)))
    for n in range(1000):
        assert cuts.reusable(n) == max(place for place in places if place <= n)
