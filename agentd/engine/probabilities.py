"""Logits as log-probabilities, and how far two distributions are apart. Pure."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def log_probabilities(logits: Floats) -> Floats:
    """log softmax (n_vocab,)."""
    with np.errstate(invalid="ignore"):  # what is not finite shows in the result
        shifted = logits - logits.max()
        return np.asarray(shifted - np.log(np.exp(shifted, dtype=np.float64).sum()), dtype=np.float32)


def kl_divergence(reference: Floats, candidate: Floats) -> float:
    """KL(reference ‖ candidate) in nats from two vectors of log-probabilities."""
    with np.errstate(invalid="ignore"):  # what is not finite shows in the result
        p = np.exp(reference, dtype=np.float64)
        return float(np.sum(p * (reference.astype(np.float64) - candidate)))
