"""What comes before, in and after a model's blocks, found in any model that keeps its blocks in a ModuleList."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Split:
    """A model cut in front of its last k blocks, of which `first` is the first one's index.

    `suffix` are the parameters of the last k blocks and of all that is registered after them (final norm, head),
    `trunk` is the rest, both by the names of `named_parameters`. A head that is tied to the embedding belongs to the
    trunk: with a large vocabulary it has more parameters than several blocks.
    """

    blocks: list[nn.Module]
    first: int
    trunk: frozenset[str]
    suffix: frozenset[str]


def block_list(model: nn.Module, n: int | None = None) -> nn.ModuleList:
    """The list of the model's blocks, first to last: the one with the most parameters, of those with `n` members where
    that is known. Raises ValueError without."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not (lists := [each for each in lists if n in (None, len(each))]):
        raise ValueError(f"{type(model).__name__} keeps no blocks in a ModuleList")
    return max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))


def split(model: nn.Module, k: int) -> Split:
    """Cuts in front of the last k blocks. k = 0 leaves everything in the trunk, the head too, and k = L everything in
    the suffix, the embedding too. Raises ValueError for other k."""
    blocks = list(block_list(model))
    if not 0 <= k <= len(blocks):
        raise ValueError(f"k = {k}, and the model has {len(blocks)} blocks")
    names = {parameter: name for name, parameter in model.named_parameters()}
    everything = frozenset(names.values())
    if k in (0, len(blocks)):
        nothing = frozenset[str]()
        return Split(blocks, len(blocks) - k, *((everything, nothing) if k == 0 else (nothing, everything)))
    order = list(model.modules())
    inside = {module for block in blocks for module in block.modules()}
    last = max(order.index(block) for block in blocks)
    learning = {module for block in blocks[-k:] for module in block.modules()}
    learning |= {module for module in order[last:] if module not in inside}
    below = {parameter for module in order if module not in learning for parameter in module.parameters(recurse=False)}
    above = {parameter for module in learning for parameter in module.parameters(recurse=False)}
    suffix = frozenset(names[parameter] for parameter in above - below)
    return Split(blocks, len(blocks) - k, everything - suffix, suffix)
