"""Turns the dial: which method with how many blocks, for the memory there is now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agentd.budget.footprint import Architecture, Term, Workload, engine_terms, total, trainer_terms
from agentd.errors import PassRefused

METHODS = ("mezo", "suffix-bp", "elasticzo")


@dataclass(frozen=True)
class Plan:
    """One setting of the dial. `blocks` is k, the number of last blocks trained by BP; `terms` what it allocates."""

    method: str
    blocks: int
    terms: tuple[Term, ...]

    @property
    def needed(self) -> int:
        """Bytes this plan takes beyond what serving takes, all processes together."""
        return total(self.terms)

    def needed_by(self, process: str) -> int:
        """Bytes that one process ("engine" or "trainer") takes for this plan."""
        return total([term for term in self.terms if term.process == process])

    @property
    def predicted(self) -> dict[str, int]:
        """Bytes by "process: term", as a pass records them."""
        return {f"{term.process}: {term.name}": term.bytes for term in self.terms}

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "blocks": self.blocks,
            "needed_bytes": self.needed,
            "terms": [term.as_json() for term in self.terms],
        }


@dataclass(frozen=True)
class Choice:
    """The plan taken, the budget it fits, and every plan that was looked at, the most preferred first."""

    plan: Plan
    budget: int
    available: int
    reserve: int
    considered: tuple[Plan, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            **self.plan.as_json(),
            "budget_bytes": self.budget,
            "available_bytes": self.available,
            "reserve_bytes": self.reserve,
            "considered": [
                {
                    "method": plan.method,
                    "blocks": plan.blocks,
                    "needed_bytes": plan.needed,
                    "shortfall_bytes": max(0, plan.needed - self.budget),
                }
                for plan in self.considered
            ],
        }


def preference(plan: Plan) -> float:
    """The accuracy a pass is expected to reach, where nothing is known yet about this device and task.

    Measured with prototypes on SmolLM2-135M, 512 movie-review snippets: MeZO 0.74; suffix BP in the chat template 0.807
    at k = 1 and 0.823 at k = 4; ElasticZO 0.01 above suffix BP. Beyond k = 4 a suffix was not seen to gain, and costs
    time in proportion to k.
    """
    if plan.method == "mezo":
        return 0.74
    suffix = 0.807 + 0.004 * (min(plan.blocks, 4) - 1) - 0.001 * max(0, plan.blocks - 4)
    return suffix + (0.01 if plan.method == "elasticzo" else 0.0)


def plans(
    arch: Architecture, workload: Workload, *, runtime: Mapping[str, int] | None = None, bp: bool = True
) -> Iterator[Plan]:
    """Every setting of the dial: MeZO, and suffix BP and ElasticZO at k = 1, 2, 4, ... and all blocks.

    `runtime` overrides the fixed costs by process (measured on this machine); `bp` False leaves BP out, for models that
    the trainer cannot build.
    """
    yield plan_for(arch, workload, "mezo", 0, runtime=runtime)
    if bp:
        for blocks in _dial(arch.n_layer):
            for method in ("suffix-bp", "elasticzo"):
                yield plan_for(arch, workload, method, blocks, runtime=runtime)


def plan_for(
    arch: Architecture, workload: Workload, method: str, blocks: int, *, runtime: Mapping[str, int] | None = None
) -> Plan:
    """The plan with exactly this setting, and its terms."""
    terms = engine_terms(arch, workload, runtime=(runtime or {}).get("engine"))
    if method != "mezo":
        terms += trainer_terms(arch, workload, blocks, runtime=(runtime or {}).get("trainer"))
    return Plan(method, blocks, tuple(terms))


def choose(
    arch: Architecture,
    workload: Workload,
    *,
    available: int,
    reserve: int,
    limit: int | None = None,
    method: str = "auto",
    blocks: int | str = "auto",
    runtime: Mapping[str, int] | None = None,
    bp: bool = True,
    no_bp_reason: str = "the trainer cannot build this architecture",
) -> Choice:
    """The preferred plan that fits `available` - `reserve` bytes (and `limit`). A given method or k is respected.

    Raises PassRefused: with a shortfall in bytes where memory is missing, with 0 where the wish cannot be met at all.
    """
    wished = _wished(arch, workload, method, blocks, runtime, bp, no_bp_reason)
    considered = tuple(sorted(wished, key=lambda plan: (-preference(plan), plan.needed)))
    budget = max(0, available - reserve)
    if limit is not None:
        budget = min(budget, limit)
    for plan in considered:
        if plan.needed <= budget:
            return Choice(plan, budget, available, reserve, considered)
    smallest = min(considered, key=lambda plan: plan.needed)
    raise _refusal(smallest, budget, available, reserve, limit)


def _dial(n_layer: int) -> list[int]:
    powers = [1 << i for i in range(n_layer.bit_length()) if 1 << i < n_layer]
    return [*powers, n_layer]


def _wished(
    arch: Architecture,
    workload: Workload,
    method: str,
    blocks: int | str,
    runtime: Mapping[str, int] | None,
    bp: bool,
    no_bp_reason: str,
) -> list[Plan]:
    if method not in ("auto", *METHODS):
        raise PassRefused(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if not bp and (method in ("suffix-bp", "elasticzo") or blocks not in ("auto", 0)):
        raise PassRefused(f"backpropagation was asked for, but {no_bp_reason}; method mezo can be used")
    if blocks == "auto":
        return [plan for plan in plans(arch, workload, runtime=runtime, bp=bp) if method in ("auto", plan.method)]
    k = int(blocks)
    if not 0 <= k <= arch.n_layer:
        raise PassRefused(f"{k} blocks were asked for, and the model has {arch.n_layer}")
    if k == 0:
        if method == "suffix-bp":
            raise PassRefused("suffix-bp with 0 blocks would train nothing; give it blocks, or use mezo")
        return [plan_for(arch, workload, "mezo", 0, runtime=runtime)]
    if method == "mezo":
        raise PassRefused(f"mezo trains no blocks by backpropagation, and {k} were asked for; use elasticzo")
    methods = ("suffix-bp", "elasticzo") if method == "auto" else (method,)
    return [plan_for(arch, workload, name, k, runtime=runtime) for name in methods]


def _refusal(plan: Plan, budget: int, available: int, reserve: int, limit: int | None) -> PassRefused:
    shortfall = plan.needed - budget
    reducible = [term for term in plan.terms if term.reduce]
    largest = max(reducible or plan.terms, key=lambda term: term.bytes)
    advice = f"; {largest.reduce}" if largest.reduce else ""
    cap = f", and memory.limit allows {_mb(limit)}" if limit is not None else ""
    dial = f"{plan.method} with {plan.blocks} block{'s' if plan.blocks != 1 else ''}" if plan.blocks else plan.method
    return PassRefused(
        f"the smallest plan ({dial}) needs {_mb(plan.needed)}; {_mb(available)} are available, of which "
        f"memory.reserve keeps {_mb(reserve)}{cap}: {_mb(shortfall)} ({shortfall} bytes) short. "
        f"The largest term that can be reduced is {largest.name} ({_mb(largest.bytes)}){advice}",
        shortfall,
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
