"""How a chain of revisions goes from the base to its weights: segment by segment, in an order that the bits depend on.

A segment is zeroth-order steps by one rule, or low-rank adapters that are added to the weights one by one. What
backpropagation has moved is no segment: its values at the end are all that counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agentd.learn.update_rule import UpdateRule

_MAX_SEGMENTS = 10_000
_MAX_RANK = 1 << 16


@dataclass(frozen=True)
class Segment:
    """`steps` of zeroth order by `rule`, or adapters of these `ranks`."""

    steps: int = 0
    rule: UpdateRule = UpdateRule()
    ranks: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"ranks": list(self.ranks)} if self.ranks else {"steps": self.steps, "update": self.rule.as_json()}


def of_manifest(manifest: Mapping[str, Any], steps: int) -> tuple[Segment, ...]:
    """The segments of one revision whose ledger has `steps` steps. Raises ValueError where they do not fit together."""
    if manifest.get("segments"):
        return from_json(manifest["segments"], steps)
    segments = []
    if steps:
        update = manifest.get("update")
        segments.append(Segment(steps, UpdateRule.from_json(update) if update else UpdateRule()))
    if manifest.get("ranks"):
        segments.append(Segment(ranks=_ranks(manifest["ranks"])))
    return tuple(segments)


def merged(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """The same way in as few segments as say it. Sparse steps stay apart: what they leave alone depends on where a
    segment begins."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else Segment()
        if last.ranks and segment.ranks:
            merged[-1] = Segment(ranks=last.ranks + segment.ranks)
        elif last.steps and segment.steps and last.rule == segment.rule and segment.rule.sparsity is None:
            merged[-1] = Segment(last.steps + segment.steps, segment.rule)
        else:
            merged.append(segment)
    return tuple(merged)


def from_json(tree: Any, steps: int) -> tuple[Segment, ...]:
    """Segments as `Segment.as_json` writes them, which have `steps` steps together. Raises ValueError."""
    if not isinstance(tree, list) or len(tree) > _MAX_SEGMENTS or not all(isinstance(x, dict) for x in tree):
        raise ValueError("its segments are no list of objects")
    segments = []
    for each in tree:
        if set(each) == {"ranks"} and each["ranks"]:
            segments.append(Segment(ranks=_ranks(each["ranks"])))
        elif set(each) == {"steps", "update"} and type(each["steps"]) is int and each["steps"] > 0:
            segments.append(Segment(each["steps"], UpdateRule.from_json(each["update"])))
        else:
            raise ValueError("one of its segments is neither steps nor low-rank adapters")
    if sum(segment.steps for segment in segments) != steps:
        raise ValueError(f"its segments do not have the {steps} steps of its ledger")
    return tuple(segments)


def _ranks(tree: Any) -> tuple[int, ...]:
    if not isinstance(tree, list) or not all(type(rank) is int and 0 < rank <= _MAX_RANK for rank in tree):
        raise ValueError("it has no usable ranks")
    return tuple(tree)
