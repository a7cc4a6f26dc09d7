"""One setting of the dial and what it allocates; and every setting there is for a model on this machine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentd.budget import calibration as calibrations
from agentd.budget import in_place
from agentd.budget.calibration import Factor
from agentd.budget.footprint import Term, daemon_terms, engine_terms, stays_in_file, total, trainer_terms
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.workload import Workload, micro_tokens
from agentd.methods import BLOCKWISE, FORWARD_ONLY

Calibration = Mapping[tuple[str, str], Factor]
"""Per (process, family) what earlier passes on this machine tell, see `calibration.factors`."""

_ONE_AT_A_TIME_FROM = 2  # blocks; with fewer there is nothing to do without
_HALF_STEPS_FROM = 8  # blocks
_OF_A_STEP = ("activations", "activations of the last block", "gradients of activations", "attention mask")


@dataclass(frozen=True)
class Plan:
    """One setting of the dial. `blocks` is k, the number of last blocks trained by BP; `terms` what it allocates.

    checkpoint    one block is in memory at a time, and is computed again for its gradient
    micro_tokens  tokens in one forward pass of the trainer, which the activations were computed for
    bf16          the trainer multiplies matrices in bfloat16
    small         these are fewer than would be fastest
    streamed      the blocks' matrices stay in the file, and a part of one is made whenever it is multiplied
    """

    method: str
    blocks: int
    terms: tuple[Term, ...]
    checkpoint: bool = False
    micro_tokens: int = 0
    bf16: bool = False
    small: bool = False
    streamed: bool = False

    @property
    def needed(self) -> int:
        """Bytes this plan takes beyond what serving takes, all processes together."""
        return total(self.terms)

    def needed_by(self, process: str) -> int:
        """Bytes that one process ("daemon", "engine" or "trainer") takes for this plan."""
        return total([term for term in self.terms if term.process == process])

    @property
    def by_formula(self) -> int:
        """As `needed`, without what earlier passes have taught about the formulas."""
        return total(term for term in self.terms if term.name != calibrations.TERM)

    @property
    def family(self) -> str:
        """The plans whose predictions err together with this one's."""
        return calibrations.family(self.method, self.blocks, self.checkpoint)

    @property
    def predicted(self) -> dict[str, int]:
        """Bytes by "process: term", as a pass records them."""
        return {f"{term.process}: {term.name}": term.bytes for term in self.terms}

    @property
    def computes_trunk(self) -> bool:
        """Whether the trainer runs the frozen trunk. In bfloat16 it is faster than the engine; in float32 slower."""
        return self.bf16 and self.method not in ("mezo", BLOCKWISE)

    @property
    def setting(self) -> str:
        """The setting in words."""
        if not self.blocks:
            return self.method
        details = ", one in memory at a time" if self.checkpoint and self.method != BLOCKWISE else ""
        details += ", small micro-batches" if self.small else ""
        return f"{self.method} with {self.blocks} block{'s' if self.blocks != 1 else ''}{details}"

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "blocks": self.blocks,
            "checkpoint": self.checkpoint,
            "micro_tokens": self.micro_tokens,
            "small": self.small,
            "streamed": self.streamed,
            "bf16": self.bf16,
            "computes_trunk": self.computes_trunk,
            "needed_bytes": self.needed,
            "terms": [term.as_json() for term in self.terms],
        }


@dataclass(frozen=True)
class Overrun:
    """A plan that a running pass found to be wrong: its trainer took more than it was allowed.

    size    bytes that the formulas gave the plan, all processes together
    factor  what the trainer took, in units of what the formulas gave it, at least 1
    """

    family: str
    size: int
    factor: float

    @classmethod
    def of(cls, plan: Plan, trainer_bytes: int) -> "Overrun":
        """`trainer_bytes` are the bytes that the trainer had when it was stopped."""
        trainer = total(t for t in plan.terms if t.process == "trainer" and t.name != calibrations.TERM)
        return cls(plan.family, plan.by_formula, max(1.0, trainer_bytes / max(1, trainer)))

    def excludes(self, plan: Plan) -> bool:
        """Whether this is the plan, or one that is as large: what has no trainer is never meant."""
        return plan.blocks > 0 and plan.by_formula >= self.size


def corrected(calibration: Calibration | None, overruns: Sequence[Overrun]) -> Calibration:
    """What earlier passes tell, and what this one has found out; the latter without the former's bounds."""
    factors = dict(calibration or {})
    for overrun in overruns:
        key = ("trainer", overrun.family)
        known = factors.get(key)
        if known is None or known.factor < overrun.factor:
            factors[key] = Factor(*key, overrun.factor, 1 if known is None else known.passes + 1)
    return factors


@dataclass(frozen=True)
class PlanSpace:
    """Makes plans. `runtime` overrides the fixed costs by process (measured on this machine); `bf16` says that its
    processor multiplies matrices of bfloat16, `in_place` that the engine's own weights learn."""

    arch: ModelShapes
    workload: Workload
    runtime: Mapping[str, int] | None = None
    calibration: Calibration | None = None
    bf16: bool = False
    in_place: bool = False

    def plans(self, bp: bool = True) -> Iterator[Plan]:
        """Every setting: MeZO; suffix BP and ElasticZO at k = 1, 2, 4, 8, 12, ..., with their blocks in memory together
        or one at a time; and block-wise BP in all blocks.

        `bp` False leaves BP out, for models that the trainer cannot build. Where the engine's own weights learn: MeZO
        and its relatives; ElasticZO, LoHo and BP at these k, with one block's activations in memory at a time from
        k = 2 on; and LoRA in all blocks.
        """
        if self.in_place:
            yield from (self.plan(method, 0) for method in FORWARD_ONLY)
            for blocks in self._settings():
                if blocks < self.arch.n_layer:
                    yield self.plan("elasticzo", blocks)
                    yield self.plan("loho", blocks)
                yield self.plan("bp", blocks)
            yield self.plan("lora", self.arch.n_layer)
            return
        yield self.plan("mezo", 0)
        if not bp:
            return
        n_layer = self.arch.n_layer
        for blocks in self._settings():
            for method in ("suffix-bp", "elasticzo"):
                yield from self.variants(method, blocks)
        yield self.plan(BLOCKWISE, n_layer)

    def variants(self, method: str, blocks: int) -> Iterator[Plan]:
        """The plans that train `blocks` blocks by `method`: in micro-batches as large as pays, in the smallest that do,
        and with one block in memory at a time."""
        yield self.plan(method, blocks)
        if method == BLOCKWISE:
            return
        usual = micro_tokens(self.arch, blocks, prefix=self.workload.prefix)
        if micro_tokens(self.arch, blocks, small=True) < usual:
            yield self.plan(method, blocks, small=True)
        if blocks >= _ONE_AT_A_TIME_FROM:
            yield self.plan(method, blocks, checkpoint=True)

    def plan(self, method: str, blocks: int, checkpoint: bool | None = None, *, small: bool = False) -> Plan:
        """The plan with exactly this setting; `checkpoint` as the workload says if left out.

        small  the trainer keeps less for its backward pass, in more and smaller micro-batches
        """
        tapped = method == BLOCKWISE
        if checkpoint is None:
            checkpoint = self.workload.checkpoint
        work = replace(self.workload, checkpoint=checkpoint or tapped, bf16=self.bf16)
        tokens = work.micro_tokens or micro_tokens(self.arch, blocks, work.checkpoint, small, work.prefix)
        work = replace(work, micro_tokens=tokens)
        constants = self.runtime or {}
        terms = daemon_terms(work)
        if self.in_place:
            terms += in_place.engine_terms(self.arch, work, method, blocks, runtime=constants.get("engine"))
            checkpoint = blocks >= _ONE_AT_A_TIME_FROM
            correction = self._correction(terms, method, blocks, checkpoint)
            return Plan(method, blocks, (*terms, *correction), checkpoint)
        zeroth_order = method in ("mezo", "elasticzo")
        terms += engine_terms(
            self.arch, work, blocks, tapped=tapped, zeroth_order=zeroth_order, runtime=constants.get("engine")
        )
        if method == "mezo":
            return Plan(method, 0, (*terms, *self._correction(terms, method, 0, False)))
        fixed = {"runtime": constants.get("trainer"), "start": constants.get("trainer's start")}
        terms += trainer_terms(self.arch, work, blocks, tapped=tapped, **fixed)
        terms += self._correction(terms, method, blocks, work.checkpoint)
        terms.append(_taken_in_turns(terms, tapped))
        streamed = stays_in_file(self.arch, work, blocks, one=work.checkpoint)
        return Plan(method, blocks, tuple(terms), work.checkpoint, tokens, self.bf16, small, streamed)

    def _settings(self) -> list[int]:
        """k = 1, 2, 4, 8, 12, 16, 24, ... and all blocks: half steps where a whole one is large.

        A pass that is just too large with 16 blocks was left with 8, which found much less: 12 found as much as 16.
        """
        n_layer = self.arch.n_layer
        powers = [1 << i for i in range(n_layer.bit_length())]
        steps = sorted({*powers, *(3 * power // 2 for power in powers if power >= _HALF_STEPS_FROM)})
        return [*(k for k in steps if k < n_layer), n_layer]

    def _correction(self, terms: list[Term], method: str, blocks: int, checkpoint: bool) -> list[Term]:
        """A term for each process that earlier passes have shown to take more or less than its terms say."""
        family, corrections = calibrations.family(method, blocks, checkpoint), []
        for process in dict.fromkeys(term.process for term in terms):
            factor = (self.calibration or {}).get((process, family))
            if factor is not None:
                size = int((factor.factor - 1) * total(term for term in terms if term.process == process))
                formula = f"{factor.factor - 1:+.3f} x the process's terms, from {factor.passes} earlier passes"
                corrections.append(Term(calibrations.TERM, size, formula, process))
        return corrections


def _taken_in_turns(terms: Sequence[Term], tapped: bool) -> Term:
    """What must not be counted twice: the engine scores and judges when the trainer is gone, and keeps no more than a
    context with its cache until then. Where it is asked in every step, the trainer waits for the answer and has given
    back what a step alone needs."""
    engine = {term.name: term.bytes for term in terms if term.process == "engine"}
    trainer = {term.name: term.bytes for term in terms if term.process == "trainer"}
    if tapped:
        for_scores = engine["logits"] + engine["compute buffer"]
        of_a_step = sum(trainer[name] for name in _OF_A_STEP)
        formula = "- the smaller of: the engine's logits and compute buffer; the trainer's activations and gradients"
        return Term("taken in turns", -min(for_scores, of_a_step), formula, "together")
    for_scores = sum(size for name, size in engine.items() if name not in ("runtime", "background KV cache"))
    formula = "- the smaller of: the trainer; the engine without its runtime and KV cache"
    return Term("taken in turns", -min(for_scores, sum(trainer.values())), formula, "together")
