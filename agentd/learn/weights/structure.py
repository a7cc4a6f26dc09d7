"""What comes before, in and after a model's blocks, found in any model that keeps its blocks in a ModuleList."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Split:
    """A model cut in front of its last k blocks.

    `suffix` are the parameters of the last k blocks and of all that is registered after them (final norm, head); a head
    that is tied to the embedding belongs to it. `trunk` is the rest. Both by the names of `named_parameters`.
    """

    blocks: list[nn.Module]
    first: int
    trunk: frozenset[str]
    suffix: frozenset[str]
    shared: list[nn.Module]
    """Modules of the trunk that share a parameter with the suffix: the embedding of a tied head."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks, first to last: the members of the ModuleList with the most parameters. Raises ValueError without."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"{type(model).__name__} keeps no blocks in a ModuleList")
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in lists]
    return list(lists[sizes.index(max(sizes))])


def split(model: nn.Module, k: int, *, tied: bool = True) -> Split:
    """Cuts in front of the last k blocks. k = 0 leaves everything in the trunk, the head too, and k = L everything in
    the suffix, the embedding too. `tied` False leaves a head that is tied to the embedding in the trunk: with a large
    vocabulary it has more parameters than several blocks. Raises ValueError for other k."""
    blocks = blocks_of(model)
    if not 0 <= k <= len(blocks):
        raise ValueError(f"k = {k}, and the model has {len(blocks)} blocks")
    names = {parameter: name for name, parameter in model.named_parameters()}
    if k in (0, len(blocks)):
        everything, nothing = frozenset(names.values()), frozenset[str]()
        trunk, suffix = (everything, nothing) if k == 0 else (nothing, everything)
        return Split(blocks, len(blocks) - k, trunk, suffix, [])
    order = list(model.modules())
    inside = {module for block in blocks for module in block.modules()}
    last = max(order.index(block) for block in blocks)
    suffix_modules = [module for block in blocks[-k:] for module in block.modules()]
    suffix_modules += [module for module in order[last:] if module not in inside]
    trained = {parameter for module in suffix_modules for parameter in module.parameters(recurse=False)}
    shared = [
        module
        for module in order
        if module not in suffix_modules and any(p in trained for p in module.parameters(recurse=False))
    ]
    if not tied:
        trained -= {parameter for module in shared for parameter in module.parameters(recurse=False)}
        shared = []
    suffix = frozenset(names[parameter] for parameter in trained)
    return Split(blocks, len(blocks) - k, frozenset(names.values()) - suffix, suffix, shared)
