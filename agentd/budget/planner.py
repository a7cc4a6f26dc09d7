"""Turns the dial: which method with how many blocks, for the memory there is now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentd.budget.expectation import HORIZON, Expected, PastPass, Speed, expect
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.plan import Calibration, Overrun, Plan, PlanSpace, corrected
from agentd.budget.workload import Workload
from agentd.errors import PassRefused
from agentd.methods import BLOCKWISE, FORWARD_ONLY, OF_ENGINE


@dataclass(frozen=True)
class Considered:
    """A plan, what it is expected to bring, and by how much it misses the budget: 0 where it fits."""

    plan: Plan
    expected: Expected
    shortfall: int

    @property
    def fits(self) -> bool:
        return self.shortfall == 0

    def as_json(self, *, terms: bool = False) -> dict[str, Any]:
        tree = {**self.plan.as_json(), **self.expected.as_json(), "fits": self.fits, "shortfall_bytes": self.shortfall}
        return tree if terms else {name: value for name, value in tree.items() if name != "terms"}


@dataclass(frozen=True)
class Choice:
    """The plan taken, the budget it fits, and every plan that was looked at, the most preferred first."""

    plan: Plan
    budget: int
    available: int
    reserve: int
    considered: tuple[Considered, ...]

    @property
    def taken(self) -> Considered:
        """The plan with what is expected of it."""
        return next(each for each in self.considered if each.plan == self.plan)

    @property
    def why(self) -> str:
        """Why this plan and no other, for a person."""
        choice = self.taken
        better = [each for each in self.considered[: self.considered.index(choice)] if not each.fits]
        others = [each for each in self.considered if each.fits and each.plan != self.plan]
        first = choice.expected.passes
        basis = {0: "what other devices saw; no pass has ended here yet", 1: "one earlier pass"}
        text = (
            f"{self.plan.setting} needs {_mb(self.plan.needed)} of the {_mb(self.budget)} there are and is expected to "
            f"gain {_gain(choice)}, going by {basis.get(first, f'{first} earlier passes')}. "
        )
        if better:
            text += f"{better[0].plan.setting} would be better and is {_mb(better[0].shortfall)} short. "
        if others:
            return text + f"Next best of what fits: {others[0].plan.setting}, {_gain(others[0])}."
        if len(self.considered) > 1:
            return text + "No other plan fits."
        return text + "It was asked for, so no other was looked at."

    def as_json(self) -> dict[str, Any]:
        return {
            **self.plan.as_json(),
            **self.taken.expected.as_json(),
            "budget_bytes": self.budget,
            "available_bytes": self.available,
            "reserve_bytes": self.reserve,
            "why": self.why,
            "considered": [each.as_json() for each in self.considered],
        }


def consider(
    arch: ModelShapes,
    workload: Workload,
    *,
    budget: int,
    method: str = "auto",
    blocks: int | str = "auto",
    runtime: Mapping[str, int] | None = None,
    bp: bool = True,
    no_bp_reason: str = "the trainer cannot build this architecture",
    most_blocks: int | None = None,
    bf16: bool = False,
    calibration: Calibration | None = None,
    speed: Speed | None = None,
    history: Sequence[PastPass] = (),
    zo_steps: Mapping[str, int] | None = None,
    horizon: float = HORIZON,
    in_place: bool = False,
    overruns: Sequence[Overrun] = (),
) -> tuple[Considered, ...]:
    """Every plan that the wish allows, the best first, without those that turned out wrong in the same pass
    (`overruns`). Raises PassRefused where the wish cannot be met at all.

    bp           whether the trainer can build the model's blocks; if not, or not all, `no_bp_reason` says why
    most_blocks  last blocks that it can train, all of them where None
    """
    dial = PlanSpace(arch, workload, runtime, corrected(calibration, overruns), bf16, in_place)
    wished = [
        plan
        for plan in _wished(dial, method, blocks, bp, no_bp_reason, most_blocks)
        if not any(overrun.excludes(plan) for overrun in overruns)
    ]
    if not wished:
        raise PassRefused("what was asked for needs more memory than its plan said, as this pass has found out")
    expected = expect(
        workload,
        wished,
        arch,
        speed=speed,
        history=history,
        zo_steps=zo_steps,
        horizon=horizon,
        in_place=in_place,
    )
    candidates = [
        Considered(plan, what, max(0, plan.needed - budget)) for plan, what in zip(wished, expected, strict=True)
    ]
    return tuple(sorted(candidates, key=lambda each: (-each.expected.score, each.plan.needed)))


def choose(
    arch: ModelShapes,
    workload: Workload,
    *,
    available: int,
    reserve: int,
    limit: int | None = None,
    method: str = "auto",
    blocks: int | str = "auto",
    **knowledge: Any,
) -> Choice:
    """The best plan that fits `available` - `reserve` bytes (and `limit`). A given method or k is respected.

    `knowledge` is what `consider` takes besides: the machine's constants and calibration, its speed, earlier passes.
    Raises PassRefused: with a shortfall in bytes where memory is missing, with 0 where the wish cannot be met at all.
    """
    budget = budget_of(available, reserve, limit)
    considered = consider(arch, workload, budget=budget, method=method, blocks=blocks, **knowledge)
    for each in considered:
        if each.fits:
            return Choice(each.plan, budget, available, reserve, considered)
    raise refusal(considered, available=available, reserve=reserve, limit=limit)


def budget_of(available: int, reserve: int, limit: int | None = None) -> int:
    """Bytes a pass may take."""
    budget = max(0, available - reserve)
    return budget if limit is None else min(budget, limit)


def _wished(
    dial: PlanSpace, method: str, blocks: int | str, bp: bool, no_bp_reason: str, most_blocks: int | None
) -> list[Plan]:
    known = OF_ENGINE["transformers" if dial.in_place else "llamacpp"]
    if method not in ("auto", *known):
        raise PassRefused(f"this engine has no method {method!r}; it has {', '.join(known)}")
    if not dial.in_place and not bp and (method in ("suffix-bp", "elasticzo", BLOCKWISE) or blocks not in ("auto", 0)):
        raise PassRefused(f"backpropagation was asked for, but {no_bp_reason}; method mezo can be used")
    if blocks != "auto" and not 0 <= int(blocks) <= dial.arch.n_layer:
        raise PassRefused(f"{blocks} blocks were asked for, and the model has {dial.arch.n_layer}")
    most = dial.arch.n_layer if most_blocks is None or dial.in_place else most_blocks
    if most < (dial.arch.n_layer if method == BLOCKWISE else 0 if blocks == "auto" else int(blocks)):
        raise PassRefused(f"no more than the last {most} blocks can be trained by backpropagation: {no_bp_reason}")
    if blocks == "auto":
        return [plan for plan in dial.plans(bp) if method in ("auto", plan.method) and plan.blocks <= most]
    k, n_layer = int(blocks), dial.arch.n_layer
    if k == 0:
        if method in ("suffix-bp", BLOCKWISE, "bp"):
            raise PassRefused(f"{method} with 0 blocks would train nothing; give it blocks, or use mezo")
        if method in ("lora", "loho"):
            raise PassRefused(f"{method} with 0 blocks has no backpropagation; use mezo-lora or mezo")
        return [dial.plan(method if method in FORWARD_ONLY else "mezo", 0)]
    if method in FORWARD_ONLY:
        raise PassRefused(f"{method} trains no blocks by backpropagation, and {k} were asked for; use elasticzo")
    if dial.in_place:
        if method == "elasticzo" and k == n_layer:
            raise PassRefused(f"elasticzo with all {k} blocks leaves no trunk for zeroth-order steps; use bp")
        if method == "lora" and k != n_layer:
            raise PassRefused(f"lora learns in all {n_layer} blocks, not in {k} of them")
        every = ("bp", "lora") if k == n_layer else ("bp", "elasticzo", "loho")
        return [dial.plan(name, k) for name in (every if method == "auto" else (method,))]
    names = ("suffix-bp", "elasticzo", BLOCKWISE) if method == "auto" else (method,)
    return [plan for name in names for plan in dial.variants(name, k)]


def refusal(considered: Sequence[Considered], *, available: int, reserve: int, limit: int | None = None) -> PassRefused:
    """What the smallest plan needs, what there is, how much is missing and what would make it smaller."""
    smallest = min(considered, key=lambda each: each.plan.needed)
    plan, shortfall = smallest.plan, smallest.shortfall
    reducible = [term for term in plan.terms if term.reduce]
    largest = max(reducible or plan.terms, key=lambda term: term.bytes)
    advice = f"; {largest.reduce}" if largest.reduce else ""
    cap = f", and memory.limit allows {_mb(limit)}" if limit is not None else ""
    return PassRefused(
        f"the smallest plan ({plan.setting}) needs {_mb(plan.needed)}; {_mb(available)} are available, of which "
        f"memory.reserve keeps {_mb(reserve)}{cap}: {_mb(shortfall)} ({shortfall} bytes) short. "
        f"The largest term that can be reduced is {largest.name} ({_mb(largest.bytes)}){advice}",
        shortfall,
    )


def _gain(each: Considered) -> str:
    return f"{each.expected.gain:+.3f} in {each.expected.seconds:.0f} s"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
