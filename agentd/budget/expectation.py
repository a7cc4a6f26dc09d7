"""What a plan is expected to gain, and how long it takes: from this device's speed and what earlier passes gained.

The gain of a pass is the share of right answers it adds on holdout; for free text the share of the loss it takes away.
Everything here is an estimate to compare plans with; nothing is promised by it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agentd.budget.model_shapes import ModelShapes
from agentd.budget.recipe import recipe
from agentd.budget.workload import Workload, computed_tokens, forward_passes

ZO_STEPS: Mapping[str, int] = {
    "mezo": 200,
    "sparse-mezo": 200,
    "mezo-lora": 200,
    "adazeta": 100,
    "elasticzo": 10,
    "suffix-bp": 0,
    "blockwise-bp": 0,
}
IN_PLACE_EPOCHS, IN_PLACE_STEPS = 4, (32, 160)  # of BP on the weights themselves: epochs, and at least and at most
LOHO_PERIOD = 4  # one step of backpropagation in this many
HORIZON = 4 * 3600.0  # seconds in which a gain is counted: about what lies between passes

_ZO_BATCH = 16
_QUERIES = 4.0  # adazeta's forwards in a step: queries grow from one to three in its usual epochs
_ZO_EVALUATION = 0.3  # of a run's forward passes again, to judge it
_LAST_BLOCK = 0.4  # of a block's work: the last one runs only where it is scored
_OVERHEAD_TOKENS = 20.0  # a forward pass of the trainer costs as much as if it had this many tokens more
_DEV = 1 / 8  # of the examples that are learned judge instead, at first and twice an epoch (trainer/loop.py)
_LOOK = 0.45  # of what a step takes per token: no backward pass
_TRUNK = 1.25  # measured: of the time of a block alone, with masks along answers
_ENGINE_ROW = 1.6  # measured: a scored row in the engine against the vocabulary's product: its log-probabilities, too
_TIES = 0.5  # of the holdout of choices that is answered besides, because two are about as good (gate.py)
_DRIFT_TOKENS = 2000.0  # for base and candidate, twice: before the gate, which an adapter is shortened for, and there
_TEXT_GAIN, _ZO_TEXT_GAIN = 0.6, 0.02  # of texts, by backpropagation in enough blocks, and by zeroth-order steps alone
_ENOUGH, _DEPTH = 0.5, 0.75  # the share of blocks that is enough, and the power with which the gain goes up to it
_USUAL_BLOCKS = 24  # of a model of which the number is not known
_PRIOR_WEIGHT = 2.0  # how many passes the prior counts for
_FORGET = 0.8  # weight of a pass against the next newer one


class Expectable(Protocol):
    """A setting of the dial; `micro_tokens` are those of one forward pass of the trainer, 0 where it is not known."""

    @property
    def method(self) -> str: ...
    @property
    def blocks(self) -> int: ...
    @property
    def checkpoint(self) -> bool: ...
    @property
    def micro_tokens(self) -> int: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def computes_trunk(self) -> bool: ...


@dataclass(frozen=True)
class Speed:
    """What this device computes. The defaults are those of two x86 cores with SmolLM2-135M in Q4_1.

    forward     tokens per second through the whole model in the engine
    backward    tokens per second through one block in the trainer, forward and backward, in one large micro-batch
    trunk       tokens per second through one block in the trainer, forward alone, in bfloat16
    load        weights per second out of the file into matrices to multiply by
    start       seconds until the trainer's first step
    answer      tokens per second of answers at the gate
    fixed       seconds of everything that is the same for all plans and takes no computing by the model: tokenising,
                files
    """

    forward: float = 400.0
    backward: float = 7000.0
    trunk: float = 32000.0
    load: float = 2e9
    start: float = 6.0
    answer: float = 40.0
    fixed: float = 6.0


@dataclass(frozen=True)
class PastPass:
    """What an earlier pass gained, and its seconds from the plan to the end of its trial. `texts`: most of its answers
    were texts or calls of tools; `computed`: what this device's speed promised for its own examples, 0: not known."""

    method: str
    blocks: int
    gain: float
    seconds: float
    checkpoint: bool = False
    micro_tokens: int = 0
    streamed: bool = False
    computes_trunk: bool = False
    texts: bool = False
    computed: float = 0.0


@dataclass(frozen=True)
class Expected:
    """`score` is the gain that is there on average over the horizon, the time of the pass itself included; `computed`
    are the seconds by this device's speed alone, without what earlier passes took."""

    gain: float
    seconds: float
    score: float
    passes: int
    computed: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "expected_gain": round(self.gain, 4),
            "seconds": round(self.seconds, 1),
            "computed_seconds": round(self.computed, 1),
            "gain_per_second": self.gain / self.seconds,
            "score": round(self.score, 5),
            "passes": self.passes,
        }


def prior_gain(method: str, blocks: int, texts: bool = False, n_layer: int = 0) -> float:
    """The gain where nothing is known yet about this device and its tasks. `texts`: answers are texts or calls of
    tools; `n_layer` of the model, 0 where it is not known.

    In a text every token has to be right, and what it says is taken from the question by blocks further down: the gain
    goes with the share of the blocks that learn, up to half of them. What zeroth-order steps find in texts is a guess.
    The figures behind it: docs/benchmarks.md, lab notes.
    """
    if texts:
        share = 1.0 if method == "lora" else blocks / max(n_layer, blocks, _USUAL_BLOCKS)
        trained = math.pow(min(1.0, share / _ENOUGH), _DEPTH)
        by_text = _ZO_TEXT_GAIN + (_TEXT_GAIN - _ZO_TEXT_GAIN) * trained
        # In the order in which they come for choices.
        order = {"blockwise-bp": 0.003, "bp": 0.05, "loho": 0.06, "mezo-lora": 0.01, "adazeta": 0.01}
        return by_text - order.get(method, 0.0)
    if method in ("lora", "mezo-lora", "adazeta"):
        return 0.35 if method == "lora" else 0.10
    if method == "mezo" or blocks == 0:
        return 0.20
    doublings = math.log2(blocks)
    gain = 0.25 + 0.04 * min(1.0, doublings) + 0.003 * min(3.0, max(0.0, doublings - 1))
    return gain - {"blockwise-bp": 0.003, "loho": 0.01}.get(method, 0.0)


def in_place_steps(method: str, blocks: int, examples: int) -> int:
    """Steps that a pass on the weights themselves takes where nothing else is asked for; `examples` to train on."""
    if not blocks:
        return ZO_STEPS[method]
    least, most = IN_PLACE_STEPS
    return min(most, max(least, IN_PLACE_EPOCHS * -(-examples // _ZO_BATCH)))


def in_place_seconds(workload: Workload, speed: Speed, setting: Expectable, n_layer: int) -> float:
    """How long a pass on the weights themselves takes: the gate, and forwards, which a block's backward is two of (and
    one more where its activations are made again)."""
    each = workload.tokens / max(1, workload.examples)
    steps = in_place_steps(setting.method, setting.blocks, workload.examples * 4 // 5)
    backward = (3.0 if setting.checkpoint else 2.0) * setting.blocks / max(1, n_layer)
    forwards = {"lora": 1.0, "adazeta": _QUERIES}.get(setting.method, 2.0)
    if setting.method == "bp":  # what is below the trained blocks is run once for an example
        forwards = (setting.blocks + (n_layer - setting.blocks) / IN_PLACE_EPOCHS) / max(1, n_layer)
    if setting.method == "loho":
        forwards += (backward - 1.0) / LOHO_PERIOD  # such a step has one forward
    else:
        forwards += backward
    step = (forwards + 2 * _ZO_EVALUATION) * min(_ZO_BATCH, workload.examples) * each
    return judging_seconds(workload, speed) + steps * step / speed.forward


def seconds_for(
    workload: Workload, speed: Speed, setting: Expectable, arch: ModelShapes, zo_steps: Mapping[str, int] = ZO_STEPS
) -> float:
    """How long the pass takes: tap, backpropagation, zeroth-order steps, gate, trial, and what is the same for all."""
    row = row_cost(arch)
    seconds, forward, learned = judging_seconds(workload, speed, row), 0.0, _learned(workload)
    if setting.blocks:
        is_tapped = setting.method == "blockwise-bp"
        how = recipe(setting.method, setting.blocks, workload.texts, learned.examples)
        work = replace(_part(learned, 1 - _DEV), batch=how.batch)
        # The frozen trunk is run once; where all trained blocks are tapped the model runs in every epoch.
        if setting.computes_trunk:
            seconds += _TRUNK * learned.tokens * (arch.n_layer - setting.blocks) / speed.trunk
        else:
            trunk = 1 - setting.blocks / arch.n_layer
            tokens = computed_tokens(work, setting.micro_tokens)
            forward += tokens * how.usual if is_tapped else learned.tokens * trunk
        looks = (2 * how.usual + 1) * _LOOK * _DEV / (1 - _DEV)
        seconds += speed.start + (how.usual + looks) * epoch_seconds(work, speed, setting, arch)
    each = (learned.tokens + row * learned.scored_rows) / learned.examples
    forward += (1 + _ZO_EVALUATION) * 2 * zo_steps.get(setting.method, 0) * min(_ZO_BATCH, learned.examples) * each
    return seconds + forward / speed.forward


def epoch_seconds(workload: Workload, speed: Speed, setting: Expectable, arch: ModelShapes) -> float:
    """In the trainer, in batches of `workload.batch`."""
    steps, passes = -(-workload.examples // workload.batch), forward_passes(workload, setting.micro_tokens)
    is_tapped = setting.method == "blockwise-bp"
    per_token, loads = 1 / speed.backward, 2 * passes if setting.streamed else 0
    if setting.checkpoint and not is_tapped:  # what enters the blocks is computed first, through all of them
        # A forward is half of the products of both, or less of the time.
        per_token += 1 / min(speed.trunk, 2 * speed.backward)
        loads += passes if setting.streamed else 2 * steps
    elif setting.checkpoint:
        loads = loads or steps
    tokens = computed_tokens(workload, setting.micro_tokens) + _OVERHEAD_TOKENS * passes
    seconds = tokens * (setting.blocks - 1 + _LAST_BLOCK) * per_token
    block, head = arch.block_parameters[-1], arch.n_vocab * arch.n_embd
    # The head is one more block, which only scored positions go through, and which is read in every forward pass.
    seconds += workload.scored_rows * head / block / speed.backward
    return seconds + (loads * setting.blocks * block + passes * head) / speed.load


def row_cost(arch: ModelShapes) -> float:
    """What a scored row costs the engine: so many tokens through all blocks."""
    return _ENGINE_ROW * arch.n_vocab * arch.n_embd / max(1, sum(arch.block_parameters))


def judging_seconds(workload: Workload, speed: Speed, row: float = 0.0) -> float:
    """What every pass takes besides learning: what serves and the candidate have their holdout scored and answer it,
    each within what the gate has for it; drift; the candidate's skills (the base's are known); the trial."""
    share = 1 - _learned(workload).tokens / max(1, workload.tokens)
    ties = 0.0 if workload.texts else _TIES
    scores = 2 * (1 + ties) * share * (workload.tokens + row * workload.scored_rows) / speed.forward
    answers = 2 * workload.answer_tokens / speed.answer
    if workload.answer_seconds:
        scores, answers = min(scores, workload.answer_seconds), min(answers, workload.answer_seconds)
    texts = (_DRIFT_TOKENS + workload.probe_tokens) / speed.forward
    return speed.fixed + scores + answers + texts + workload.trial_seconds


def _learned(workload: Workload) -> Workload:
    """Without the holdout, which only the gate sees."""
    tokens = workload.tokens - (workload.holdout_tokens or workload.tokens // 5)
    return replace(_part(workload, 4 / 5), tokens=tokens)


def _part(workload: Workload, share: float) -> Workload:
    """Of as many examples as this share of them has."""
    n = max(1, round(share * workload.examples))
    rows = round(share * workload.scored_rows)
    return replace(workload, tokens=round(share * workload.tokens), examples=n, rows=rows)


def expect(
    workload: Workload,
    settings: Sequence[Expectable],
    arch: ModelShapes,
    *,
    speed: Speed | None = None,
    history: Sequence[PastPass] = (),
    zo_steps: Mapping[str, int] | None = None,
    horizon: float = HORIZON,
    in_place: bool = False,
) -> list[Expected]:
    """What each setting is expected to bring. `history` has the newest pass first.

    Dividing the gain by the pass's own seconds would take the cheapest plan always, because the first block finds most
    of the gain. The answers of the time after the pass count as well, so the gain is averaged over `horizon` seconds
    that begin with the pass: a slow plan is there for less of them.
    """
    speed, steps = speed or Speed(), zo_steps or ZO_STEPS

    def predicted(setting: Expectable) -> float:
        if in_place:
            return in_place_seconds(workload, speed, setting, arch.n_layer)
        return seconds_for(workload, speed, setting, arch, steps)

    weights = [_FORGET**age for age in range(len(history))]
    # What choices gained says nothing of texts, nor the other way round; how fast the device is, both say.
    of_kind = [w * (past.texts == workload.texts) for w, past in zip(weights, history, strict=True)]

    def prior(setting: Expectable | PastPass) -> float:
        return prior_gain(setting.method, setting.blocks, workload.texts, arch.n_layer)

    ratios = [max(0.0, past.gain) / prior(past) for past in history]
    # How much there is to gain on these tasks, with any plan ...
    scale = (_PRIOR_WEIGHT + _dot(of_kind, ratios)) / (_PRIOR_WEIGHT + sum(of_kind))
    paces = [past.seconds / (past.computed or predicted(past)) for past in history]
    pace = math.exp(_dot(weights, [math.log(min(4.0, max(0.25, p))) for p in paces]) / (_PRIOR_WEIGHT + sum(weights)))
    expectations = []
    for setting in settings:
        # ... and how this plan does compared with that: passes with the same or a similar setting tell.
        near = [w * _similarity(setting, past) for w, past in zip(of_kind, history, strict=True)]
        own = (_PRIOR_WEIGHT * scale + _dot(near, ratios)) / (_PRIOR_WEIGHT + sum(near))
        gain = prior(setting) * own
        computed = predicted(setting)
        seconds = pace * computed
        # Beyond the horizon nothing is left, but of two such plans the quicker one is still the better.
        left = 1 - seconds / horizon if seconds < 0.9 * horizon else 0.09 * horizon / seconds
        expectations.append(Expected(gain, seconds, gain * left, len(history), computed))
    return expectations


def _similarity(setting: Expectable, past: PastPass) -> float:
    """1 for the same setting; each doubling of k halves it, and so does another method."""
    distance = abs(math.log2(1 + setting.blocks) - math.log2(1 + past.blocks)) + (setting.method != past.method)
    return float(0.5**distance)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
