"""Differential privacy of what a board sends: clipping, Gaussian noise, and the ε that they amount to.

One round releases a vector x of the board's own. Whatever its data are, x lies in the ball of radius C (clipping), so
two sets of data move it by 2 C at most, and x + N(0, (m C)^2 I) is rho-zCDP with rho = (2 C)^2 / (2 (m C)^2) = 2 / m^2
(Bun and Steinke 2016, proposition 1.6). Rounds add up, each may depend on those before it (lemma 1.7), and rho-zCDP is
(rho + 2 sqrt(rho ln(1 / delta)), delta)-differentially private (proposition 1.3).

This is local and holds for the board's data as a whole: neighbours are any two data sets, and no one is trusted with
what came before the noise. Amplification by sampling or shuffling is not counted. The arithmetic is binary64, whose
gaps leak what real numbers would not (Mironov 2012); results are rounded to binary32 before they leave, which hides
most of these.
"""

import math
from collections.abc import Callable, Sequence


def clipped(values: Sequence[float], norm: float) -> list[float]:
    """The vector, scaled down to the Euclidean `norm` where it is longer. One that is not finite becomes zero."""
    length = math.hypot(*values)
    if not math.isfinite(length):
        return [0.0] * len(values)
    scale = min(1.0, norm / length) if length else 1.0
    return [scale * value for value in values]


def noised(values: Sequence[float], deviation: float, gauss: Callable[[float, float], float]) -> list[float]:
    """With independent Gaussian noise on every entry, zeros included. `gauss(mean, deviation)` must not be one that can
    be foretold: random.SystemRandom has such."""
    return [value + gauss(0.0, deviation) for value in values]


def rho(multiplier: float) -> float:
    """zCDP of one round whose noise has a standard deviation of `multiplier` clipping norms. Infinite without noise."""
    return 2.0 / multiplier**2 if multiplier else math.inf


def epsilon(total: float, delta: float) -> float:
    """The ε for this delta, of rounds whose rho sum up to `total`."""
    return total + 2.0 * math.sqrt(total * math.log(1.0 / delta)) if math.isfinite(total) else math.inf
