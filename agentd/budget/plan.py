"""One setting of the dial and what it allocates; and every setting there is for a model on this machine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agentd.budget import calibration as calibrations
from agentd.budget.calibration import Factor
from agentd.budget.footprint import (
    Architecture,
    Term,
    Workload,
    daemon_terms,
    engine_terms,
    micro_tokens,
    total,
    trainer_terms,
)

METHODS = ("mezo", "suffix-bp", "elasticzo")
Calibration = Mapping[tuple[str, str], Factor]
"""Per (process, family) what earlier passes on this machine tell, see `calibration.factors`."""

_CHECKPOINT_FROM = 4  # blocks; below, keeping one block's activations saves nothing worth its time


@dataclass(frozen=True)
class Plan:
    """One setting of the dial. `blocks` is k, the number of last blocks trained by BP; `terms` what it allocates.

    checkpoint    blocks are computed again for their gradient instead of keeping what is inside them
    micro_tokens  tokens in one forward pass of the trainer, which the activations were computed for
    """

    method: str
    blocks: int
    terms: tuple[Term, ...]
    checkpoint: bool = False
    micro_tokens: int = 0

    @property
    def needed(self) -> int:
        """Bytes this plan takes beyond what serving takes, all processes together."""
        return total(self.terms)

    def needed_by(self, process: str) -> int:
        """Bytes that one process ("daemon", "engine" or "trainer") takes for this plan."""
        return total([term for term in self.terms if term.process == process])

    @property
    def predicted(self) -> dict[str, int]:
        """Bytes by "process: term", as a pass records them."""
        return {f"{term.process}: {term.name}": term.bytes for term in self.terms}

    @property
    def setting(self) -> str:
        """The setting in words."""
        if not self.blocks:
            return self.method
        kept = ", checkpointed" if self.checkpoint else ""
        return f"{self.method} with {self.blocks} block{'s' if self.blocks != 1 else ''}{kept}"

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "blocks": self.blocks,
            "checkpoint": self.checkpoint,
            "micro_tokens": self.micro_tokens,
            "needed_bytes": self.needed,
            "terms": [term.as_json() for term in self.terms],
        }


@dataclass(frozen=True)
class Dial:
    """Makes plans. `runtime` overrides the fixed costs by process (measured on this machine); `checkpointing` adds
    plans that compute blocks again instead of keeping their activations."""

    arch: Architecture
    workload: Workload
    runtime: Mapping[str, int] | None = None
    calibration: Calibration | None = None
    checkpointing: bool = False

    def plans(self, bp: bool = True) -> Iterator[Plan]:
        """Every setting: MeZO, and suffix BP and ElasticZO at k = 1, 2, 4, ... and all blocks.

        `bp` False leaves BP out, for models that the trainer cannot build.
        """
        yield self.plan("mezo", 0)
        if not bp:
            return
        n_layer = self.arch.n_layer
        powers = [1 << i for i in range(n_layer.bit_length()) if 1 << i < n_layer]
        for blocks in (*powers, n_layer):
            for method in ("suffix-bp", "elasticzo"):
                yield self.plan(method, blocks)
                if self.checkpointing and blocks >= _CHECKPOINT_FROM:
                    yield self.plan(method, blocks, checkpoint=True)

    def plan(self, method: str, blocks: int, checkpoint: bool | None = None) -> Plan:
        """The plan with exactly this setting; `checkpoint` as the workload says if left out."""
        work = self.workload if checkpoint is None else replace(self.workload, checkpoint=checkpoint)
        constants = self.runtime or {}
        terms = daemon_terms(work) + engine_terms(self.arch, work, blocks, runtime=constants.get("engine"))
        if method == "mezo":
            return Plan(method, 0, (*terms, *self._correction(terms, method, 0, False)))
        terms += trainer_terms(self.arch, work, blocks, runtime=constants.get("trainer"))
        terms += self._correction(terms, method, blocks, work.checkpoint)
        tokens = work.micro_tokens or micro_tokens(self.arch, blocks, work.checkpoint)
        return Plan(method, blocks, tuple(terms), work.checkpoint, tokens)

    def _correction(self, terms: list[Term], method: str, blocks: int, checkpoint: bool) -> list[Term]:
        """A term for each process that earlier passes have shown to take more or less than its terms say."""
        family, found = calibrations.family(method, blocks, checkpoint), []
        for process in dict.fromkeys(term.process for term in terms):
            factor = (self.calibration or {}).get((process, family))
            if factor is not None:
                size = int((factor.factor - 1) * total(term for term in terms if term.process == process))
                formula = f"{factor.factor - 1:+.3f} x the process's terms, from {factor.passes} earlier passes"
                found.append(Term(calibrations.TERM, size, formula, process))
        return found
