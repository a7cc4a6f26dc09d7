"""How a line of revisions goes from the base to its weights: leg by leg, the order of which the bits depend on.

A leg is zeroth-order steps that move the weights in one way, or low-rank changes that are added to them one by one.
What backpropagation has moved is no leg: its values in the end are all that counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Rule = tuple[tuple[str, Any], ...]
"""How steps move the weights, as arguments of `learn.weights.mezo.InPlace`: distribution and sparsity."""

DISTRIBUTIONS = ("rademacher", "gaussian")
_MOST = 10_000  # legs
_RANKS = 1 << 16  # the largest rank


@dataclass(frozen=True)
class Leg:
    """So many `steps` by `rule`, or changes of these `ranks`."""

    steps: int = 0
    rule: Rule = ()
    ranks: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"ranks": list(self.ranks)} if self.ranks else {"steps": self.steps, "update": dict(self.rule)}


def of_manifest(manifest: Mapping[str, Any], steps: int) -> tuple[Leg, ...]:
    """The legs of one revision whose ledger has so many steps. Raises ValueError where they do not fit one another."""
    if manifest.get("legs"):
        return checked(manifest["legs"], steps)
    rule = manifest.get("update") or {}
    legs = []
    if steps:
        legs.append(Leg(steps, tuple((key, rule[key]) for key in ("distribution", "sparsity") if key in rule)))
    if manifest.get("ranks"):
        legs.append(Leg(ranks=_ranks(manifest["ranks"])))
    return tuple(legs)


def joined(legs: Iterable[Leg]) -> tuple[Leg, ...]:
    """The same way in as few legs as tell it. Sparse steps stay apart: what they leave alone depends on where a leg
    begins."""
    found: list[Leg] = []
    for leg in legs:
        last = found[-1] if found else Leg()
        if last.ranks and leg.ranks:
            found[-1] = Leg(ranks=last.ranks + leg.ranks)
        elif last.steps and leg.steps and last.rule == leg.rule and not dict(leg.rule).get("sparsity"):
            found[-1] = Leg(last.steps + leg.steps, leg.rule)
        else:
            found.append(leg)
    return tuple(found)


def checked(tree: Any, steps: int) -> tuple[Leg, ...]:
    """Legs as `Leg.as_json` writes them, which have so many steps together. Raises ValueError."""
    if not isinstance(tree, list) or not 0 < len(tree) <= _MOST or not all(isinstance(each, dict) for each in tree):
        raise ValueError("its legs are no list of objects")
    legs = []
    for each in tree:
        if set(each) == {"ranks"} and each["ranks"]:
            legs.append(Leg(ranks=_ranks(each["ranks"])))
        elif set(each) == {"steps", "update"} and type(each["steps"]) is int and each["steps"] > 0:
            legs.append(Leg(each["steps"], rule_of(each["update"])))
        else:
            raise ValueError("one of its legs is neither steps nor low-rank changes")
    if sum(leg.steps for leg in legs) != steps:
        raise ValueError(f"its legs do not have the {steps} steps of its ledger")
    return tuple(legs)


def rule_of(tree: Any) -> Rule:
    """A rule from the JSON object that says it. Raises ValueError."""
    if not isinstance(tree, dict) or set(tree) != {"distribution", "sparsity"}:
        raise ValueError("it has no usable update")
    if tree["distribution"] not in DISTRIBUTIONS:
        raise ValueError(f"its update has the distribution {tree['distribution']!r}")
    sparsity = tree["sparsity"]
    if sparsity is not None and not (isinstance(sparsity, float) and 0 < sparsity < 1):
        raise ValueError(f"its update has the sparsity {sparsity!r}")
    return (("distribution", tree["distribution"]), ("sparsity", sparsity))


def _ranks(tree: Any) -> tuple[int, ...]:
    if not isinstance(tree, list) or not all(type(rank) is int and 0 < rank <= _RANKS for rank in tree):
        raise ValueError("it has no usable ranks")
    return tuple(tree)
