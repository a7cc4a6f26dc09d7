"""What modules compute, replaced for a while: how methods perturb weights, add changes, recompute and leave out.

A replacement is an instance's own `forward`. Replacements nest, and all of a model's can be put aside at any moment:
then it is the model it was made as, for whoever needs that one in the middle of a step.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

_NAME = "forward"


@contextlib.contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within it these modules compute with these functions."""
    with contextlib.ExitStack() as undo:
        for module, forward in forwards:
            undo.callback(_restore, module, vars(module).get(_NAME))
            vars(module)[_NAME] = forward
        yield


@contextlib.contextmanager
def as_made(model: nn.Module) -> Iterator[None]:
    """Within it every module of the model computes what its class says, whatever replaces that around it."""
    aside = [(module, vars(module).pop(_NAME)) for module in model.modules() if _NAME in vars(module)]
    try:
        yield
    finally:
        for module, forward in aside:
            vars(module)[_NAME] = forward


def _restore(module: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        vars(module).pop(_NAME, None)
    else:
        vars(module)[_NAME] = before
