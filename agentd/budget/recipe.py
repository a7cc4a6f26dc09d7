"""How a pass with k blocks by backpropagation trains: what its accuracy and its time both depend on."""

from dataclasses import dataclass

from agentd.methods import BLOCKWISE

_STEPS = 100  # about so many, or more
_FEWEST_EPOCHS, _MOST_EPOCHS = 3, 5
_BATCH, _LARGE_BATCH = 8, 16
_FEW = 2  # blocks, with which choices are learned by more epochs of less noisy steps
_LARGER_STEPS = 20  # blocks up to which the larger steps were tried
_DECIDED = 192  # examples from which on those that judge are enough to end training (trainer/loop.py)


@dataclass(frozen=True)
class Recipe:
    """`lr` of AdamW at its height, examples in a step, the most epochs, and how many are run until dev gets no better,
    usually."""

    lr: float
    batch: int
    epochs: int
    usual: float


def recipe(method: str, blocks: int, texts: bool = False, examples: int = 0) -> Recipe:
    """About a hundred steps or more, the fewer examples there are the more epochs, within limits; with many blocks the
    steps are smaller.

    texts     answers are texts or calls of tools, and not choices
    examples  that are learned from; 0: few

    What was tried: docs/benchmarks.md, lab notes.
    """
    if blocks <= _FEW and method != BLOCKWISE and not texts:
        return Recipe(2e-3, _LARGE_BATCH, 8, 8.0 if 0 < examples < _DECIDED else 4.0)
    # All blocks are read anew in every step, one after the other: few and large ones, where examples are short.
    batch = _LARGE_BATCH if method == BLOCKWISE and not texts else _BATCH
    enough = round(_STEPS * batch / examples) if examples else _MOST_EPOCHS
    epochs = max(_FEWEST_EPOCHS, min(_MOST_EPOCHS, enough))
    lr = 1e-3 if method == BLOCKWISE or blocks > _LARGER_STEPS else 2e-3
    return Recipe(lr, batch, epochs, float(epochs))
