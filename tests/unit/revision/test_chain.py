"""The order of a line's steps and changes, as manifests and exports have it."""

from typing import Any

import pytest

from agentd.learn.update_rule import UpdateRule
from agentd.revision import chain
from agentd.revision.chain import Segment

SIGNS, SPARSE = UpdateRule("rademacher"), UpdateRule("rademacher", 0.75)


def test_what_is_alike_is_one_segment_but_sparse_steps_are_not() -> None:
    way = [
        Segment(3, SIGNS),
        Segment(4, SIGNS),
        Segment(2, SPARSE),
        Segment(2, SPARSE),
        Segment(ranks=(8,)),
        Segment(ranks=(4, 8)),
    ]
    assert chain.merged(way) == (Segment(7, SIGNS), Segment(2, SPARSE), Segment(2, SPARSE), Segment(ranks=(8, 4, 8)))
    assert chain.merged([]) == ()


def test_segments_are_read_as_they_are_written() -> None:
    way = (Segment(3, SIGNS), Segment(ranks=(8, 4)), Segment(2, SPARSE))
    assert chain.from_json([each.as_json() for each in way], 5) == way
    assert chain.of_manifest({"segments": [each.as_json() for each in way]}, 5) == way


def test_a_manifest_without_segments_has_its_steps_and_then_its_changes() -> None:
    update = SIGNS.as_json()
    assert chain.of_manifest({"update": update}, 3) == (Segment(3, SIGNS),)
    assert chain.of_manifest({"update": update, "ranks": [8]}, 0) == (Segment(ranks=(8,)),)
    assert chain.of_manifest({"update": update, "ranks": [], "tensors": 4}, 0) == ()


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        (None, "no list"),
        ([], "do not have the 3 steps"),
        ([3], "no list"),
        ([{"ranks": []}], "neither"),
        ([{"ranks": [0]}], "no usable ranks"),
        ([{"ranks": [True]}], "no usable ranks"),
        ([{"ranks": [8], "steps": 3}], "neither"),
        ([{"steps": 0, "update": SIGNS.as_json()}], "neither"),
        ([{"steps": True, "update": SIGNS.as_json()}], "neither"),
        ([{"steps": 2, "update": SIGNS.as_json()}], "do not have the 3 steps"),
        ([{"steps": 3, "update": {}}], "no usable update"),
        ([{"steps": 3, "update": {"distribution": "cauchy", "sparsity": None}}], "distribution 'cauchy'"),
        ([{"steps": 3, "update": {"distribution": "gaussian", "sparsity": 1.5}}], "sparsity 1.5"),
    ],
)
def test_segments_that_make_no_sense_are_refused(tree: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        chain.from_json(tree, 3)
