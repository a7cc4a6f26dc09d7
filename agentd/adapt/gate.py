"""Is the candidate better than what serves? Judged on holdout, scored in the engine that will serve it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentd.adapt.dataset import Member
from agentd.config import Gate
from agentd.learn.objectives import objective
from agentd.learn.significance import mcnemar, paired_permutation, welch

# The level at which higher losses on established holdout count where the new holdout gains more than it: then the two
# say different things, and the pass has to show that it does no harm rather than be shown that it does.
_SUSPICIOUS = 0.25


@dataclass(frozen=True)
class Outcome:
    """How one model does on a task's holdout. `hits` is empty for free text; `established` says of each example whether
    it judged an earlier revision, and is empty where none did."""

    losses: list[float]
    hits: list[bool]
    established: list[bool] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float | None:
        return sum(self.hits) / len(self.hits) if self.hits else None

    def among(self, chosen: Sequence[bool]) -> "Outcome":
        """The same, on the chosen examples alone."""

        def those(values: list[Any]) -> list[Any]:
            return [value for value, taken in zip(values, chosen, strict=True) if taken]

        # A task may have demonstrations among its labels: those have a loss and no hit.
        return Outcome(those(self.losses), those(self.hits) if len(self.hits) == len(self.losses) else [])


@dataclass(frozen=True)
class Verdict:
    """Whether to take the candidate, why, and the figures it rests on: per task, and the drift in nats per token."""

    accepted: bool
    reason: str
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    drift: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {"accepted": self.accepted, "reason": self.reason, "tasks": self.tasks, "drift": self.drift}


def outcomes(
    members: Sequence[Member],
    tokens: Mapping[int, dict[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    nll_weight: float,
) -> dict[str, Outcome]:
    """Per task, from the engine's log-likelihoods of the members in their order."""
    found: dict[str, Outcome] = {}
    for member, score in zip(members, scores, strict=True):
        result = objective(
            [[value] for value in score["choices"]], tokens[member.number]["correct"], score["target"], nll_weight
        )
        outcome = found.setdefault(member.example.task, Outcome([], []))
        outcome.losses.append(result.loss)
        outcome.established.append(member.established)
        if result.predicted is not None:
            right = result.predicted == tokens[member.number]["correct"]
            outcome.hits.append(right and all(map(math.isfinite, score["choices"])))
    return found


def judge(
    before: Mapping[str, Outcome],
    after: Mapping[str, Outcome],
    *,
    adapted: set[str],
    drift: float | None,
    gate: Gate,
    seed: int,
) -> Verdict:
    """The candidate must be finite, stay under the drift cap, lose on no task, and be better on one it learned.

    What was established before counts for itself: new feedback that contradicts it, as flipped labels do, brings new
    holdout along that agrees with it, and could outvote the old. A pass is not to lose answers there, nor confidence in
    them: its losses must not be significantly higher.

    Better: the paired test of the hits (McNemar, mid-p) or of the losses (permutation) is significant. With two tests
    on each of the adapted tasks, the level of each is alpha / (2 · tasks) (Bonferroni). `drift` None: not measured.
    """
    level = gate.alpha / (2 * max(1, len(adapted)))
    figures: dict[str, dict[str, Any]] = {}
    finite = (drift is None or math.isfinite(drift)) and all(math.isfinite(x) for o in after.values() for x in o.losses)
    losers, winners, contradicted = [], [], []
    for name, old in before.items():
        new = after[name]
        facts: dict[str, Any] = {
            "n": len(old.losses),
            "adapted": name in adapted,
            "before": {"accuracy": old.accuracy, "loss": old.loss},
            "after": {"accuracy": new.accuracy, "loss": new.loss if finite else None},
        }
        figures[name] = facts
        if not finite:
            continue
        lost, allowed = _lost(old, new, gate)
        if old.hits:
            facts["p_accuracy"] = mcnemar(old.hits, new.hits)
        facts["p_loss"] = paired_permutation(old.losses, new.losses, seed)
        if lost > allowed:
            losers.append(name)
        elif any(old.established) and not all(old.established):
            known, anew = old.among(old.established), new.among(old.established)
            facts["established"] = {
                "n": len(known.losses),
                "before": {"accuracy": known.accuracy, "loss": known.loss},
                "after": {"accuracy": anew.accuracy, "loss": anew.loss},
                **_contradiction(old, new, seed),
            }
            old_lost, old_allowed = _lost(known, anew, gate)
            apart = facts["established"]["p_apart"] <= gate.alpha
            if old_lost > old_allowed or facts["established"]["p_worse"] <= (_SUSPICIOUS if apart else gate.alpha):
                contradicted.append(name)
        if name in adapted and min(facts.get("p_accuracy", 1.0), facts["p_loss"]) <= level and lost <= 0:
            winners.append(name)
    if not finite:
        return Verdict(False, "the candidate's outputs are not finite", figures, None)
    if drift is not None and drift > gate.max_drift:
        reason = (
            f"it drifted {drift:.3f} nats per token from the base on neutral text; gate.max_drift is {gate.max_drift}"
        )
        return Verdict(False, reason, figures, drift)
    if losers:
        return Verdict(False, f"it lost on {_described(losers, figures)}", figures, drift)
    if contradicted:
        shown = {name: figures[name]["established"] for name in contradicted}
        reason = f"it lost on the holdout that earlier revisions were judged by: {_described(contradicted, shown)}"
        return Verdict(False, reason, figures, drift)
    if not winners:
        smallest = min(
            (min(f.get("p_accuracy", 1.0), f["p_loss"]) for n, f in figures.items() if n in adapted), default=1
        )
        reason = f"no task improved significantly (smallest p {smallest:.3g}, needed {level:.3g})"
        return Verdict(False, reason, figures, drift)
    return Verdict(True, f"it improved {_described(winners, figures)}", figures, drift)


def _contradiction(old: Outcome, new: Outcome, seed: int) -> dict[str, float]:
    """What the new feedback does to the established: p-values of "its losses are not higher than before" and of "the
    new holdout did not gain more than it"."""
    gains = [before - after for before, after in zip(old.losses, new.losses, strict=True)]
    known = [gain for gain, established in zip(gains, old.established, strict=True) if established]
    fresh = [gain for gain, established in zip(gains, old.established, strict=True) if not established]
    return {"p_worse": paired_permutation([0.0] * len(known), known, seed), "p_apart": welch(fresh, known)}


def _lost(old: Outcome, new: Outcome, gate: Gate) -> tuple[float, float]:
    """What the new one lost and what it may lose: in examples that are right, or for free text in nats."""
    if old.hits and new.hits:
        # One more or less is no regression that a test could see.
        return float(sum(old.hits) - sum(new.hits)), max(gate.max_regression * len(old.hits), 1.0)
    return new.loss - old.loss, gate.max_regression * abs(old.loss)


def _described(names: Sequence[str], figures: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name in names:
        old, new = figures[name]["before"], figures[name]["after"]
        hits = None if old["accuracy"] is None else f"accuracy {old['accuracy']:.3f} → {new['accuracy']:.3f}, "
        parts.append(f"{name}: {hits or ''}loss {old['loss']:.3f} → {new['loss']:.3f}")
    return "; ".join(parts)
