"""What a pass will do, and what is known when that is decided."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from agentd.adapt.gate.answers import GateAnswers
from agentd.adapt.gate.skills import probes
from agentd.adapt.planning import replay
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.budget import history
from agentd.budget.expectation import Speed
from agentd.budget.plan import Overrun
from agentd.budget.planner import Choice
from agentd.budget.recipe import recipe
from agentd.budget.workload import Workload
from agentd.config.schema import Config
from agentd.learn.encoded import Encoded, shared_prefix

MEASURED = ("forward", "answer", "backward", "trunk", "load")
"""Of a `Speed`: by adapt/planning/engine_speed.py and by trainer/agreement.py."""
ALPHA = 2.0  # LoRA alpha in units of the rank
_CHARACTERS = 4.2  # of a token
_PATIENCE = 4  # evaluations, of which an epoch has two


class PassSetting(Protocol):
    """What every kind's setting says. `blocks` is k, the last blocks or layers that learn by backpropagation."""

    @property
    def method(self) -> str: ...

    @property
    def blocks(self) -> int: ...

    @property
    def needed(self) -> int:
        """Bytes beyond serving, all processes together."""

    @property
    def predicted(self) -> dict[str, int]:
        """Bytes by term."""

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Machine:
    """What is known of this machine: what it can do for a pass and what that costs (`probed`), and the rows of earlier
    passes here, the newest first."""

    probed: Mapping[str, Any]
    earlier: Sequence[Mapping[str, Any]] = ()

    @property
    def rates(self) -> dict[str, float]:
        """What was measured of its `Speed`."""
        return {name: float(self.probed[name]) for name in MEASURED if self.probed.get(name)}

    @property
    def speed(self) -> Speed:
        return replace(Speed(), **self.rates)

    def as_arguments(self) -> dict[str, Any]:
        """As `budget.planner.consider` takes it."""
        keys = {"trainer": "runtime_bytes", "trainer's start": "start_bytes", "engine": "engine_runtime_bytes"}
        return {
            "bp": bool(self.probed["supported"]),
            "most_blocks": self.probed.get("most_blocks"),
            "no_bp_reason": str(self.probed.get("reason")),
            "bf16": bool(self.probed.get("bf16")),
            "runtime": {process: int(self.probed[key]) for process, key in keys.items() if self.probed.get(key)},
            "calibration": history.calibration(self.earlier),
            "history": history.outcomes(self.earlier),
            "speed": self.speed,
        }


@dataclass(frozen=True)
class Conditions:
    """Under which a running pass plans anew.

    held      bytes that the pass has taken already and that a plan therefore need not find free
    ceiling   the most bytes that a plan may need, besides what the configuration allows
    overruns  plans that turned out wrong in this pass
    workload  what the engine found the examples to be, which is better than an estimate from their texts
    prefers   method and blocks with which training has begun: kept where they fit, whatever else would
    """

    held: int = 0
    ceiling: int | None = None
    overruns: tuple[Overrun, ...] = ()
    workload: Workload | None = None
    prefers: tuple[str, int] | None = None


NONE = Conditions()


@dataclass(frozen=True)
class Setting:
    """What a pass will do. `blocks` is k; `zo_steps` zeroth-order steps follow on the control vectors. `steps` are all
    those of a pass on the weights themselves; `texts` says that most answers are no choices."""

    method: str
    blocks: int
    zo_steps: int
    rank: int
    choice: Choice
    steps: int = 0
    texts: bool = False

    @property
    def needed(self) -> int:
        """Bytes beyond serving, all processes together."""
        return self.choice.plan.needed

    @property
    def predicted(self) -> dict[str, int]:
        """Bytes by term."""
        return self.choice.plan.predicted

    def train_options(self, seed: int, threads: int, nll_weight: float, examples: int) -> dict[str, Any]:
        """Hyperparameters of the trainer that learns from so many examples; the rest are its defaults."""
        how = recipe(self.method, self.blocks, self.texts, examples)
        return {
            "rank": self.rank,
            "alpha": ALPHA * self.rank,
            "lr": how.lr,
            "batch": how.batch,
            "max_epochs": how.epochs,
            "patience": _PATIENCE,
            "seed": seed,
            "threads": threads,
            "nll_weight": nll_weight,
            "micro_tokens": self.choice.plan.micro_tokens,
            "checkpoint": self.choice.plan.checkpoint,
            "streamed": self.choice.plan.streamed,
            "bf16": self.choice.plan.bf16,
        }

    def as_json(self) -> dict[str, Any]:
        return {**self.choice.as_json(), "zo_steps": self.zo_steps, "rank": self.rank, "texts": self.texts}


def workload_of(encoded: Sequence[Encoded], context: int, rank: int) -> Workload:
    """What a pass works on, from its examples as the engine encoded them: exact where `Workload.estimated` has only
    texts to go by."""
    prefix = shared_prefix(encoded)
    lengths = [each.n_distinct - prefix for each in encoded]
    scored = [{(s if p >= len(each.shared) else 0, p) for s, p, _ in each.terms} for each in encoded]
    return Workload(
        seq_len=max(lengths),
        shortest=min(lengths),
        tokens=sum(lengths),
        examples=len(encoded),
        prefix=prefix,
        scored=max(map(len, scored)),
        terms=max(len(each.terms) for each in encoded),
        rows=sum(map(len, scored)),
        context=context,
        rank=rank,
        texts=2 * sum(not each.choices for each in encoded) > len(encoded),
    )


def estimate(config: Config, data: Dataset) -> Workload:
    """What a pass works on, from its examples' texts: tools first, because that is where templates have them."""
    own = replay.questions(data, 0)
    inputs = [member.example.input for member in data.members] + [question.input for question in own]
    ordered = [dict(sorted(input.items(), key=lambda item: item[0] != "tools")) for input in inputs]
    besides = [_recalled(member) for member in data.members] + [""] * len(own)
    workload = Workload.estimated(
        [json.dumps(input, ensure_ascii=False) + more for input, more in zip(ordered, besides, strict=True)],
        [member.answers for member in data.members] + [{"x" * int(replay.TOKENS * _CHARACTERS)}] * len(own),
        rank=config.adapt.rank,
        context=config.context,
    )
    return with_answers(workload, config, data)


def _recalled(member: Member) -> str:
    """What stands in its prompt besides, at most as long as that may be."""
    if member.recalled is None:
        return ""
    text = json.dumps(member.recalled["turns"], ensure_ascii=False)
    return text[: int(member.recalled["tokens"] * _CHARACTERS)]


def with_answers(workload: Workload, config: Config, data: Dataset) -> Workload:
    """With what the gate has generated, if answers are as long as the right ones, and with the probes of skills."""
    lines = GateAnswers.of(data, Path(), 0).lines
    tokens = sum(line.tokens(_CHARACTERS) for line in lines)
    probe_tokens = 0
    if config.adapt.gate.max_skill_loss < 1:
        probe_tokens = sum(int(len(probe.prompt + "".join(probe.answers)) / _CHARACTERS) + 1 for probe in probes())
    return replace(
        workload,
        answer_tokens=tokens,
        answer_seconds=config.adapt.gate.max_time,
        probe_tokens=probe_tokens,
        trial_seconds=config.adapt.trial.duration,
    )
