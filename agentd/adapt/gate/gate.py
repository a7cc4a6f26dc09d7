"""Is the candidate better than what serves? Judged on holdout, scored and answered in the engine that will serve it."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from agentd.adapt.gate.skills import Skill, lost
from agentd.adapt.planning.dataset import Member
from agentd.config.schema import GateSettings
from agentd.engine.protocol import Scores
from agentd.learn.encoded import Encoded
from agentd.learn.metrics import GENERATED
from agentd.learn.objectives import example_objective
from agentd.learn.significance import mcnemar, paired_permutation, signed_rank, welch

# The level at which higher losses on established holdout count where the new holdout gains more than it: then the two
# say different things, and the pass has to show that it does no harm rather than be shown that it does.
_SUSPICIOUS = 0.25
# The level at which generated answers must be better where the loss is by far: a holdout too small to tell by its hits
# may be helped out, but a loss that falls while the answers stay as wrong as they were is no gain.
_HINT = 0.1

# Nats: an answer's log-likelihood was seen to differ by up to 0.75 between a batch and a slot of serving, and two do.
_NEAR_TIE = 1.5

# Calls where none is wanted: a rise of more than `gate.max_regression` counts where it is unlikely to be chance, and
# one of more than a twentieth where chance is no likelier explanation. A single message is none.
_RISE, _UNLIKELY, _LARGE_RISE, _LESS_LIKELY = 1, 0.1, 0.05, 0.25

_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Outcome:
    """How one model does on a task's holdout.

    hits         whether each answer is right; empty where none can be, None where no one looked
    established  says of each example whether it judged an earlier revision, and is empty where none did
    metric       of the task
    shares       how much of each answer is right, with a metric whose answers are generated
    """

    losses: list[float]
    hits: Sequence[bool | None]
    established: list[bool] = field(default_factory=list)
    metric: str = "accuracy"
    shares: list[float | None] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float | None:
        known = self.known
        return sum(known) / len(known) if known else None

    @property
    def known(self) -> list[bool]:
        """The hits that somebody looked at; the same ones in two outcomes that are compared."""
        return [hit for hit in self.hits if hit is not None]

    @property
    def figures(self) -> dict[str, float | None]:
        figures = {"accuracy": self.accuracy, "loss": self.loss}
        if self.metric == "json":
            shares = [share for share in self.shares if share is not None]
            figures["fields"] = math.fsum(shares) / len(shares) if shares else None
        return figures

    def among(self, chosen: Sequence[bool]) -> "Outcome":
        """The same, on the chosen examples alone."""

        def those(values: list[Any]) -> list[Any]:
            return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]

        hits = those(list(self.hits)) if self.hits else []
        return Outcome(those(self.losses), hits, [], self.metric, those(self.shares) if self.shares else [])


@dataclass(frozen=True)
class NoCall:
    """Whether what serves and the candidate called a tool for messages that want none; `source` says whose these are:
    of the holdout, or small talk. `named` are some of this project's own for which the candidate did."""

    source: str
    before: list[bool]
    after: list[bool]
    named: list[str] = field(default_factory=list)

    @property
    def rise(self) -> int:
        return sum(self.after) - sum(self.before)

    @property
    def p(self) -> float:
        """Of "calls are made no more often than before": McNemar's test, by what was answered in words."""
        return mcnemar(*([not call for call in calls] for calls in (self.after, self.before)))

    def rose(self, allowed: float) -> bool:
        """Whether calls are made more often, by more than the share `allowed` of messages."""
        n, p = len(self.before), self.p
        if self.rise <= _RISE:
            return False
        return (self.rise > allowed * n and p <= _UNLIKELY) or (self.rise > _LARGE_RISE * n and p <= _LESS_LIKELY)

    @property
    def figures(self) -> dict[str, Any]:
        n = len(self.before)
        shares = {"before": sum(self.before) / n, "after": sum(self.after) / n}
        return {"source": self.source, "n": n, **shares, "p_rise": self.p, "called": self.named}


@dataclass(frozen=True)
class Verdict:
    """Whether to take the candidate, why, and the figures it rests on: per task, the drift in nats per token, and
    those of skills by group."""

    accepted: bool
    reason: str
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    drift: float | None = None
    skills: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """What it says of the tasks, without anybody's words."""
        return {
            name: {key: value for key, value in facts.items() if key != "answers"} for name, facts in self.tasks.items()
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "accepted": self.accepted,
            "reason": self.reason,
            "tasks": self.tasks,
            "drift": self.drift,
            "skills": self.skills,
        }


def is_near_tie(score: Scores) -> bool:
    """Whether another layout of what is computed together might make another choice the best one."""
    best = sorted(score.choices)[-2:]
    return len(best) == 2 and best[1] - best[0] < _NEAR_TIE


def outcomes(
    members: Sequence[Member],
    encoded: Mapping[int, Encoded],
    scores: Sequence[Scores],
    nll_weight: float,
    chosen: Mapping[int, bool] = MappingProxyType({}),
) -> dict[str, Outcome]:
    """Per task, from the engine's log-likelihoods of the members in their order; `chosen` says by its number of a near
    tie whether the right choice is served."""
    by_task: dict[str, Outcome] = {}
    hits: dict[str, list[bool | None]] = defaultdict(list)
    for member, score in zip(members, scores, strict=True):
        example = encoded[member.number]
        result = example_objective(example, score.choices, score.target, nll_weight)
        outcome = by_task.setdefault(member.example.task, Outcome([], []))
        outcome.losses.append(result.loss)
        outcome.established.append(member.established)
        # A task may have demonstrations among its labels: those have a loss and no hit.
        right = None if result.predicted is None else result.predicted == example.correct
        right = right and all(map(math.isfinite, score.choices))
        hits[member.example.task].append(chosen.get(member.number, right))
    return {
        name: replace(outcome, hits=hits[name] if any(hit is not None for hit in hits[name]) else [])
        for name, outcome in by_task.items()
    }


def judge(
    before: Mapping[str, Outcome],
    after: Mapping[str, Outcome],
    *,
    adapted: set[str],
    drift: float | None,
    gate: GateSettings,
    seed: int,
    no_calls: Mapping[str, NoCall] = _NONE,
    skills: Mapping[str, Skill] = _NONE,
    improves: bool = True,
) -> Verdict:
    """The candidate must be finite, stay under the drift cap, lose none of the base's skills and on no task, call no
    tools where none is wanted more often than before, and be better on one task that it learned. Where it is to know no
    more than what serves it need not be better (`improves` false).

    What was established before counts for itself: new feedback that contradicts it, as flipped labels do, brings new
    holdout along that agrees with it, and could outvote the old. A pass is not to lose answers there, nor confidence in
    them: its losses must not be significantly higher.

    Better: the paired test of the hits (McNemar, mid-p) or of the losses (Wilcoxon's signed ranks) is significant. With
    two tests on each of the adapted tasks, the level of each is alpha / (2 · tasks) (Bonferroni). Where answers are
    generated the losses alone are not enough: the hits must say the same, at _HINT. `drift` None: not measured.
    """
    level = gate.alpha / (2 * max(1, len(adapted)))
    figures: dict[str, dict[str, Any]] = {}
    shown = {group: skill.figures for group, skill in skills.items()}
    finite = (drift is None or math.isfinite(drift)) and all(math.isfinite(x) for o in after.values() for x in o.losses)
    losers, winners, contradicted, callers = [], [], [], list[str]()
    for name, old in before.items():
        new = after[name]
        facts: dict[str, Any] = {
            "n": len(old.losses),
            "adapted": name in adapted,
            "metric": old.metric,
            "before": old.figures,
            "after": new.figures if finite else {**new.figures, "loss": None},
        }
        figures[name] = facts
        if name in no_calls:
            facts["no_call"] = no_calls[name].figures
            if no_calls[name].rose(gate.max_regression):
                callers.append(name)
        if not finite:
            continue
        losses = [_lost(old, new, gate)]
        if any(answered := [share is not None for share in old.shares]):  # pairs that are won make up for none of those
            losses.append(_lost(old.among(answered), new.among(answered), gate))
        if old.known:
            facts["p_accuracy"] = mcnemar(old.known, new.known)
        if old.metric in GENERATED:
            facts["answered"] = sum(answered)
        facts["p_loss"] = signed_rank(old.losses, new.losses, seed)
        if any(lost > allowed for lost, allowed in losses):
            losers.append(name)
        elif any(old.established) and not all(old.established):
            known, anew = old.among(old.established), new.among(old.established)
            facts["established"] = {
                "n": len(known.losses),
                "before": known.figures,
                "after": anew.figures,
                **_contradiction(old, new, seed),
            }
            old_lost, old_allowed = _lost(known, anew, gate)
            apart = facts["established"]["p_apart"] <= gate.alpha
            if old_lost > old_allowed or facts["established"]["p_worse"] <= (_SUSPICIOUS if apart else gate.alpha):
                contradicted.append(name)
        if name in adapted and all(lost <= 0 for lost, _ in losses) and _better(facts, level):
            winners.append(name)
    if not finite:
        return Verdict(False, "the candidate's outputs are not finite", figures, None, shown)
    if drift is not None and drift > gate.max_drift:
        reason = (
            f"it drifted {drift:.3f} nats per token from the base on neutral text; gate.max_drift is {gate.max_drift}"
        )
        return Verdict(False, reason, figures, drift, shown)
    if worse := skill_problem(skills, gate):
        return Verdict(False, worse, figures, drift, shown)
    if losers:
        return Verdict(False, f"it lost on {_described(losers, figures)}", figures, drift, shown)
    if callers:
        rates = [(name, figures[name]["no_call"]) for name in callers]
        rises = [f"{name}: {f['before']:.1%} → {f['after']:.1%} of {f['n']} messages" for name, f in rates]
        return Verdict(False, f"it calls tools where none is wanted: {'; '.join(rises)}", figures, drift, shown)
    if contradicted:
        there = {name: figures[name]["established"] for name in contradicted}
        reason = f"it lost on the holdout that earlier revisions were judged by: {_described(contradicted, there)}"
        return Verdict(False, reason, figures, drift, shown)
    if not improves:
        return Verdict(True, f"it is as good: {_described(list(figures), figures)}", figures, drift, shown)
    if not winners:
        smallest = min(
            (min(f.get("p_accuracy", 1.0), f["p_loss"]) for n, f in figures.items() if n in adapted), default=1
        )
        reason = f"no task improved significantly (smallest p {smallest:.3g}, needed {level:.3g})"
        if unsaid := [name for name in figures if name in adapted and figures[name]["p_loss"] <= level]:
            reason += f"; the loss fell, the answers did not get better: {_described(unsaid, figures)}"
        return Verdict(False, reason, figures, drift, shown)
    return Verdict(True, f"it improved {_described(winners, figures)}", figures, drift, shown)


def skill_problem(skills: Mapping[str, Skill], gate: GateSettings) -> str | None:
    """Which skills the candidate lost, if it did."""
    groups = lost(skills, gate.max_skill_loss, gate.alpha)
    if not groups:
        return None
    falls = [f"{group} {skills[group].before:.3f} → {skills[group].after:.3f}" for group in groups]
    return f"it lost skills that the base has: {', '.join(falls)}; gate.max_skill_loss is {gate.max_skill_loss:g}"


def _better(facts: Mapping[str, Any], level: float) -> bool:
    by_hits, by_loss = facts.get("p_accuracy", 1.0), facts["p_loss"]
    if facts["metric"] in GENERATED:
        return bool(by_hits <= level or (by_loss <= level and by_hits <= _HINT))
    return bool(min(by_hits, by_loss) <= level)


def _contradiction(old: Outcome, new: Outcome, seed: int) -> dict[str, float]:
    """What the new feedback does to the established: p-values of "its losses are not higher than before" and of "the
    new holdout did not gain more than it"."""
    gains = [before - after for before, after in zip(old.losses, new.losses, strict=True)]
    known = [gain for gain, established in zip(gains, old.established, strict=True) if established]
    fresh = [gain for gain, established in zip(gains, old.established, strict=True) if not established]
    return {"p_worse": paired_permutation([0.0] * len(known), known, seed), "p_apart": welch(fresh, known)}


def _lost(old: Outcome, new: Outcome, gate: GateSettings) -> tuple[float, float]:
    """What the new one lost and what it may lose: in examples that are right, or for free text in nats."""
    if old.known and new.known:
        # One more or less is no regression that a test could see.
        return float(sum(old.known) - sum(new.known)), max(gate.max_regression * len(old.known), 1.0)
    return new.loss - old.loss, gate.max_regression * abs(old.loss)


def _described(names: Sequence[str], figures: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name in names:
        old, new = figures[name]["before"], figures[name]["after"]
        hits = None if old["accuracy"] is None else f"accuracy {old['accuracy']:.3f} → {new['accuracy']:.3f}, "
        parts.append(f"{name}: {hits or ''}loss {old['loss']:.3f} → {new['loss']:.3f}")
    return "; ".join(parts)
