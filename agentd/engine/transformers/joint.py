"""The next tokens of several sequences in one forward: products take the rows of all, attention is each one's own.

The tokens lie in one row, behind one another. All that a block does with a token it does without looking at the others,
except in attention. The function that computes attention can be chosen by name in transformers; ours takes one sequence
after the other through the model's own function, with the keys and values of that sequence's cache. So caches of
different lengths need no common shape: nothing is copied, padded or masked that would not be if each were alone.

Not every model is like that. Some attend without that function, some count positions by the cache: `JointCache.check`
and a comparison on the model itself (context.py) tell. What would show with long sequences only, `may_join` knows by
name.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agentd.engine.transformers.cache import SlotLayer

_NAME = "agentd-joint"
_BY_THE_LONGEST = {"dynamic", "longrope"}  # rotations whose frequencies follow the last position of a whole forward

_running: list["JointCache"] = []  # the last one is computed with


class JointCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Several sequences' caches as one: each takes the next `sizes[i]` of a row of tokens, and what follows those of
    all is padding that no cache keeps. `own` is the name of the model's own attention."""

    def __init__(self, caches: Sequence[Cache], sizes: Sequence[int], own: str) -> None:
        self.sizes, self._own = list(sizes), own
        parts = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[_Layer(layers, self.sizes) for layers in parts])
        self._masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}

    @contextlib.contextmanager
    def attended(self, configs: Sequence[Any]) -> Iterator[None]:
        """Within it what a model with these configurations attends to are these caches."""
        _running.append(self)
        try:
            with attention(configs, [_NAME] * len(configs)):
                yield
        finally:
            _running.pop()

    def check(self) -> None:
        """Raises RuntimeError where a layer's caches were not looked at."""
        if not all(layer.attended for layer in self.layers):
            raise RuntimeError("the model attends in a way of its own")

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """The outputs (1, tokens, heads, width) of a layer's attention. Raises RuntimeError."""
        layer = next((layer for layer in self.layers if layer.given is key), None)
        if layer is None or mask is not None:
            raise RuntimeError("the model changes keys that were kept, or has a mask of its own")
        layer.given, layer.attended = None, True
        compute = self._function(module)
        outputs = []
        for part, rows in zip(layer.parts, torch.split(query, [*self.sizes, layer.padding], dim=2), strict=False):
            n = rows.shape[2]
            keys, values = (part.recent(each, n) for each in (part.keys, part.values))
            outputs.append(compute(module, rows, keys, values, self._mask(n, part, rows), **kwargs)[0])
        if layer.padding:
            outputs.append(outputs[0].new_zeros(1, layer.padding, *outputs[0].shape[2:]))
        return torch.cat(outputs, dim=1)

    def _function(self, module: nn.Module) -> Callable[..., Any]:
        if self._own in ALL_ATTENTION_FUNCTIONS:
            function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self._own]
        else:
            function = sys.modules[type(module).__module__].eager_attention_forward
        return function

    def _mask(self, n: int, part: SlotLayer, rows: torch.Tensor) -> torch.Tensor | None:
        """Which of the keys that are there each of the last `n` tokens sees: a single one sees all of them."""
        if n == 1:
            return None
        length = part.recent(part.keys, n).shape[-2]
        name = n, length, part.window
        if name not in self._masks:
            own = torch.arange(length - n, length, device=rows.device)[:, None]
            others = torch.arange(length, device=rows.device)[None]
            sees = others <= own if part.window is None else (others <= own) & (others > own - part.window)
            if self._own == "eager":
                sees = torch.where(sees, 0.0, torch.finfo(rows.dtype).min).to(rows.dtype)
            self._masks[name] = sees[None, None]
        return self._masks[name]


class _Layer(DynamicLayer):  # type: ignore[misc]
    """A layer of all caches. `given` are the keys of the row of tokens, until they were `attended` to."""

    def __init__(self, parts: Sequence[SlotLayer], sizes: Sequence[int]) -> None:
        super().__init__()
        self.parts, self._sizes = parts, sizes
        self.given: torch.Tensor | None = None
        self.attended, self.padding = False, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.padding = key_states.shape[-2] - sum(self._sizes)
        sizes = [*self._sizes, self.padding]
        both = (torch.split(states, sizes, dim=-2) for states in (key_states, value_states))
        for part, own_keys, own_values in zip(self.parts, *both, strict=False):
            part.update(own_keys, own_values)
        self.given = key_states
        return key_states, value_states


def may_join(module: nn.Module, config: Any) -> bool:
    """Whether nothing is known against it: what a token sees follows from a window, if anything, and its rotation from
    its own position."""
    text = config.get_text_config()
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    rotations: set[Any] = set()
    for each in module.modules():
        kind = getattr(each, "rope_type", None)  # one, or one for every type of layers
        rotations |= set(kind.values()) if isinstance(kind, dict) else {kind}
    return not (chunked or getattr(text, "attention_chunk_size", None) or rotations & _BY_THE_LONGEST)


@contextlib.contextmanager
def attention(configs: Sequence[Any], names: Sequence[str]) -> Iterator[None]:
    """Within it models with these configurations attend by the functions of these names."""
    before = [config._attn_implementation for config in configs]
    try:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return _running[-1].attend(module, query, key, attention_mask, **kwargs), None


# No masks are registered by this name, so transformers makes none.
ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
