"""Where prompts are cut: fixed places, so that what can be taken over from another prompt does not depend on either."""

import pytest

from agentd.engine.chunks import ChunkBoundaries


@pytest.mark.parametrize(
    ("boundaries", "length", "pieces"),
    [
        (ChunkBoundaries(), 20, [20]),
        (ChunkBoundaries(), 100, [32, 32, 32, 4]),
        (ChunkBoundaries(), 600, [32, 32, 32, 32, 64, 64, 256, 88]),
        (ChunkBoundaries((64, 128)), 100, [64, 36]),
        (ChunkBoundaries((64, 128)), 300, [64, 64, 128, 44]),
    ],
)
def test_the_pieces_of_a_prompt(boundaries: ChunkBoundaries, length: int, pieces: list[int]) -> None:
    sizes, at = [], 0
    while at < length:
        stop = min(boundaries.after(at), length)
        sizes.append(stop - at)
        at = stop
    assert sizes == pieces
    assert max(sizes) <= boundaries.longest


@pytest.mark.parametrize("boundaries", [ChunkBoundaries(), ChunkBoundaries((64, 128))])
def test_what_can_be_reused_ends_at_a_boundary(boundaries: ChunkBoundaries) -> None:
    places = {0}
    while max(places) < 1000:
        places.add(boundaries.after(max(places)))
    for n in range(1000):
        assert boundaries.reusable(n) == max(place for place in places if place <= n)
