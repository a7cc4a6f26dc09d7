"""What a plan is expected to gain, and how long it takes: from this device's speed and what earlier passes gained.

The gain of a pass is the share of right answers it adds on holdout; for free text the share of the loss it takes away.
Everything here is an estimate to compare plans with; nothing is promised by it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentd.budget.footprint import Workload

ZO_STEPS: Mapping[str, int] = {"mezo": 200, "elasticzo": 10, "suffix-bp": 0, "blockwise-bp": 0}
HORIZON = 4 * 3600.0  # seconds in which a gain is counted: about what lies between passes

_ZO_BATCH = 16
_ZO_EVALUATION = 0.3  # of a run's forward passes again, to judge it
_LAST_BLOCK = 0.4  # of a block's work: the last one runs only where it is scored
_RECOMPUTE = 1.35  # with checkpointing every block runs forward twice
_PRIOR_WEIGHT = 2.0  # how many passes the prior counts for
_FORGET = 0.8  # weight of a pass against the next newer one


@dataclass(frozen=True)
class Speed:
    """What this device computes. The defaults are those of two x86 cores with SmolLM2-135M in Q4_1.

    forward     tokens per second through the whole model in the engine
    backward    tokens per second through one block in the trainer, forward and backward
    head        tokens per second through what a step does besides: reading the tap, the head, the optimiser
    start       seconds until the trainer's first step
    fixed       seconds of everything that is the same for all plans: tokenising, the trial
    """

    forward: float = 400.0
    backward: float = 5500.0
    head: float = 4000.0
    start: float = 6.0
    fixed: float = 65.0


@dataclass(frozen=True)
class Outcome:
    """What an earlier pass gained, and its seconds from the plan to the end of its trial."""

    method: str
    blocks: int
    gain: float
    seconds: float


@dataclass(frozen=True)
class Expected:
    """`score` is the gain that is there on average over the horizon, the time of the pass itself included."""

    gain: float
    seconds: float
    score: float
    passes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "expected_gain": round(self.gain, 4),
            "seconds": round(self.seconds, 1),
            "gain_per_second": self.gain / self.seconds,
            "score": round(self.score, 5),
            "passes": self.passes,
        }


def prior_gain(method: str, blocks: int) -> float:
    """The gain where nothing is known yet about this device and its tasks.

    Measured on SmolLM2-135M with 480 movie reviews, judged on others: MeZO 0.20; backpropagation in the last block
    0.25, in the last two 0.29, and no more beyond; zeroth-order steps on top brought 0.01. Block-wise BP in all
    blocks was as good as the best of these, in one epoch.
    """
    if method == "mezo" or blocks == 0:
        return 0.20
    if method == "blockwise-bp":
        return 0.295
    return 0.25 + 0.04 * min(1.0, math.log2(blocks)) + (0.01 if method == "elasticzo" else 0.0)


def epochs(method: str, blocks: int) -> float:
    """How often a pass goes through its training examples before they stop helping; of those it allows itself."""
    if method == "blockwise-bp":
        return 1.0
    return 4.0 if blocks <= 2 else 3.0


def seconds_for(
    workload: Workload, speed: Speed, method: str, blocks: int, checkpoint: bool, zo_steps: Mapping[str, int] = ZO_STEPS
) -> float:
    """How long the pass takes: tap, backpropagation, zeroth-order steps, gate, and what is the same for all."""
    each = workload.tokens / max(1, workload.examples)
    holdout = workload.holdout_tokens or workload.tokens // 5
    forward = 2.0 * holdout  # the gate scores what serves and the candidate
    seconds = speed.fixed
    if blocks:
        passes = epochs(method, blocks)
        # The frozen trunk is run once; where all trained blocks are tapped the model runs in every epoch.
        forward += workload.tokens * (passes if method == "blockwise-bp" else 1)
        depth = blocks - 1 + _LAST_BLOCK
        if checkpoint and method != "blockwise-bp":
            depth *= _RECOMPUTE
        seconds += speed.start + passes * workload.tokens * (depth / speed.backward + 1 / speed.head)
    forward += (1 + _ZO_EVALUATION) * 2 * zo_steps.get(method, 0) * min(_ZO_BATCH, workload.examples) * each
    return seconds + forward / speed.forward


def expect(
    workload: Workload,
    settings: Sequence[tuple[str, int, bool]],
    *,
    speed: Speed | None = None,
    history: Sequence[Outcome] = (),
    zo_steps: Mapping[str, int] | None = None,
    horizon: float = HORIZON,
) -> list[Expected]:
    """What each (method, k, checkpoint) is expected to bring. `history` has the newest pass first.

    Dividing the gain by the pass's own seconds would take the cheapest plan always, because the first block finds most
    of the gain. The answers of the time after the pass count as well, so the gain is averaged over `horizon` seconds
    that begin with the pass: a slow plan is there for less of them.
    """
    speed, steps = speed or Speed(), zo_steps or ZO_STEPS
    weights = [_FORGET**age for age in range(len(history))]
    ratios = [max(0.0, past.gain) / prior_gain(past.method, past.blocks) for past in history]
    # How much there is to gain on these tasks, whatever the plan ...
    scale = (_PRIOR_WEIGHT + _dot(weights, ratios)) / (_PRIOR_WEIGHT + sum(weights))
    paces = [past.seconds / seconds_for(workload, speed, past.method, past.blocks, False, steps) for past in history]
    pace = math.exp(_dot(weights, [math.log(min(4.0, max(0.25, p))) for p in paces]) / (_PRIOR_WEIGHT + sum(weights)))
    found = []
    for method, blocks, checkpoint in settings:
        # ... and how this plan does compared with that: passes with the same or a similar setting tell.
        near = [w * _similarity(method, blocks, past) for w, past in zip(weights, history, strict=True)]
        own = (_PRIOR_WEIGHT * scale + _dot(near, ratios)) / (_PRIOR_WEIGHT + sum(near))
        gain = prior_gain(method, blocks) * own
        seconds = pace * seconds_for(workload, speed, method, blocks, checkpoint, steps)
        # Beyond the horizon nothing is left, but of two such plans the quicker one is still the better.
        left = 1 - seconds / horizon if seconds < 0.9 * horizon else 0.09 * horizon / seconds
        found.append(Expected(gain, seconds, gain * left, len(history)))
    return found


def _similarity(method: str, blocks: int, past: Outcome) -> float:
    """1 for the same setting; each doubling of k halves it, and so does another method."""
    distance = abs(math.log2(1 + blocks) - math.log2(1 + past.blocks)) + (method != past.method)
    return float(0.5**distance)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
