"""How far a zeroth-order step goes: calibrated from the run itself, warmed up, and made smaller towards the end.

Along z the loss is L - lr g^2 + lr^2 g^2 c / 2 with the curvature c = (L+ + L- - 2 L0) / eps^2, whose mean over random
signs is the trace of the Hessian. Only a part of g^2 is signal, the rest is the noise of the mini-batch; that part is
agreement = 2 sum g_A g_B / sum (g_A^2 + g_B^2) over two batches A and B along the same seeds. The expected decrease is
greatest at

    lr = agreement / c,

and the run diverges beyond 2 / c.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CLIP = 3.0  # in median absolute deviations of g, which is symmetric about 0
_PRIOR_AGREEMENT = 0.3
_PRIOR_WEIGHT = 4
_MIN_AGREEMENT = 0.05
_WARMUP, _FINAL = 0.05, 0.1
WEIGHT_DECAY = 0.01  # of AdamW: as Hu et al. 2021 train LoRA on GPT-2 (table 11), and torch's default


@dataclass(frozen=True)
class Calibration:
    """What the probes found.

    `curvature` is the mean of z'Hz (the trace of the Hessian H) plus its standard error, `spread` an upper estimate of
    H's Frobenius norm (at most `curvature`), `agreement` in (0, 1] the part of g^2 that is signal, `gradient` the root
    mean square of g, `forwards` what it all cost.
    """

    curvature: float
    spread: float
    agreement: float
    gradient: float
    forwards: int

    def stable_lr(self, queries: int = 1) -> float:
        """Half the step size beyond which the loss grows; infinite where no curvature could be measured.

        Independent directions hardly disturb one another in many dimensions, so n of them bear almost n times the step:
        the average has the expected curvature (tr H + (n - 1) g'Hg / g'g) / n, and g'Hg / g'g <= ||H||_F.
        """
        if self.curvature <= 0:
            return math.inf
        return queries / (self.curvature + (queries - 1) * self.spread)

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]], curvatures: Sequence[float], forwards: int) -> "Calibration":
        """From the projected gradients of two batches along the same seeds, clipped, and from values of z'Hz."""
        total = sum(a * a + b * b for a, b in pairs) / 2
        prior = _PRIOR_WEIGHT * total / len(pairs)
        agreement = (sum(a * b for a, b in pairs) + _PRIOR_AGREEMENT * prior) / (total + prior) if total else 0.0
        # One outlier among so few must not decide.
        middle = statistics.median(curvatures)
        width = CLIP * statistics.median(abs(value - middle) for value in curvatures)
        bends = [max(middle - width, min(middle + width, value)) for value in curvatures]
        mean = statistics.fmean(bends)
        deviation = statistics.stdev(bends) if len(bends) > 1 else abs(mean)
        # Of few samples the mean is uncertain: too much curvature costs a little speed, too little the run.
        mean += deviation / math.sqrt(len(bends))
        # Var(z'Hz) = 2 (||H||_F^2 - diagonal) for signs; twice that deviation, because a few samples underestimate it.
        spread = min(mean, math.sqrt(2) * deviation) if mean > 0 else 0.0
        signal = min(1.0, max(_MIN_AGREEMENT, agreement))
        return cls(mean, spread, signal, math.sqrt(total / len(pairs)), forwards)


def schedule(step: int, steps: int) -> float:
    """The part of the step size used in `step` (1-based): linear warm-up over 5 %, then a cosine (Loshchilov and Hutter
    2017) down to 10 %, which the last step has (Hoffmann et al. 2022)."""
    warmup = math.ceil(_WARMUP * steps)
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - warmup - 1) / max(1, steps - warmup - 1)
    return _FINAL + (1 - _FINAL) * 0.5 * (1 + math.cos(math.pi * done))
