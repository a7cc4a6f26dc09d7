"""The order of a line's steps and changes, as manifests and exports have it."""

from typing import Any

import pytest

from agentd.learn import legs
from agentd.learn.legs import Leg

SIGNS = (("distribution", "rademacher"), ("sparsity", None))
SPARSE = (("distribution", "rademacher"), ("sparsity", 0.75))


def test_what_is_alike_is_one_leg_but_sparse_steps_are_not() -> None:
    way = [Leg(3, SIGNS), Leg(4, SIGNS), Leg(2, SPARSE), Leg(2, SPARSE), Leg(ranks=(8,)), Leg(ranks=(4, 8))]
    assert legs.joined(way) == (Leg(7, SIGNS), Leg(2, SPARSE), Leg(2, SPARSE), Leg(ranks=(8, 4, 8)))
    assert legs.joined([]) == ()


def test_legs_are_read_as_they_are_written() -> None:
    way = (Leg(3, SIGNS), Leg(ranks=(8, 4)), Leg(2, SPARSE))
    assert legs.checked([leg.as_json() for leg in way], 5) == way
    assert legs.of_manifest({"legs": [leg.as_json() for leg in way]}, 5) == way


def test_a_manifest_without_legs_has_its_steps_and_then_its_changes() -> None:
    update = dict(SIGNS)
    assert legs.of_manifest({"update": update}, 3) == (Leg(3, SIGNS),)
    assert legs.of_manifest({"update": update, "ranks": [8]}, 0) == (Leg(ranks=(8,)),)
    assert legs.of_manifest({"update": update, "ranks": [], "tensors": 4}, 0) == ()


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        (None, "no list"),
        ([], "no list"),
        ([3], "no list"),
        ([{"ranks": []}], "neither"),
        ([{"ranks": [0]}], "no usable ranks"),
        ([{"ranks": [True]}], "no usable ranks"),
        ([{"ranks": [8], "steps": 3}], "neither"),
        ([{"steps": 0, "update": dict(SIGNS)}], "neither"),
        ([{"steps": True, "update": dict(SIGNS)}], "neither"),
        ([{"steps": 2, "update": dict(SIGNS)}], "do not have the 3 steps"),
        ([{"steps": 3, "update": {}}], "no usable update"),
        ([{"steps": 3, "update": {"distribution": "cauchy", "sparsity": None}}], "distribution 'cauchy'"),
        ([{"steps": 3, "update": {"distribution": "gaussian", "sparsity": 1.5}}], "sparsity 1.5"),
    ],
)
def test_legs_that_make_no_sense_are_refused(tree: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        legs.checked(tree, 3)
