"""How a pass with k blocks by backpropagation trains: what its accuracy and its time both depend on."""

from dataclasses import dataclass, replace

_TEXT_STEPS, _TEXT_BATCH = 100, 8
_FEWEST_EPOCHS, _MOST_EPOCHS = 3, 5  # of texts
_LARGER_STEPS = 20  # blocks up to which the larger steps were tried


@dataclass(frozen=True)
class Recipe:
    """`lr` of AdamW at its height, examples in a step, the most epochs, and how many are run until dev gets no better,
    usually."""

    lr: float
    batch: int
    epochs: int
    usual: float


def recipe(method: str, blocks: int, texts: bool = False, examples: int = 0) -> Recipe:
    """The more blocks there are, the smaller are the steps and the fewer are needed.

    texts     answers are texts or calls of tools, of which every token has to be right, and not choices: they get
              about a hundred steps or more, the fewer examples there are the more epochs, within limits
    examples  that are learned from; 0: few

    What was tried: docs/benchmarks.md, lab notes.
    """
    if texts:
        enough = round(_TEXT_STEPS * _TEXT_BATCH / examples) if examples else _MOST_EPOCHS
        epochs = max(_FEWEST_EPOCHS, min(_MOST_EPOCHS, enough))
        return replace(recipe(method, blocks), batch=_TEXT_BATCH, epochs=epochs, usual=float(epochs))
    if method == "blockwise-bp":
        return Recipe(1e-3, 16, 1, 1.0)
    if blocks <= 2:
        return Recipe(2e-3, 16, 8, 4.0)
    if blocks <= 6:
        return Recipe(2e-3, 16, 2, 2.0)
    if blocks < 16:
        return Recipe(2e-3, 8, 2, 2.0)
    return Recipe(2e-3 if blocks <= _LARGER_STEPS else 1e-3, 8, 1, 1.0)
