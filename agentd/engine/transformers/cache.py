"""The KV cache of one slot: it grows in steps, and is cut back to a prefix when the next prompt shares one."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_STEP = 256  # tokens by which it grows


class SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values (1, heads, tokens, width) of one layer, written in place.

    transformers' own layer makes a new tensor for every token, which costs a copy of the whole cache each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._space: tuple[torch.Tensor, torch.Tensor] | None = None
        self._length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self._length, self._length + key_states.shape[-2]
        spaces = self._reserve(key_states, value_states, end)
        for space, states in zip(spaces, (key_states, value_states), strict=True):
            space[..., begin:end, :] = states
        self.cut(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def cut(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        self._length = length
        if self._space is not None:
            self.keys, self.values = (space[..., :length, :] for space in self._space)

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._space is None or self._space[0].shape[-2] < length:
            room = -(-length // _STEP) * _STEP
            spaces = tuple(t.new_empty(*t.shape[:-2], room, t.shape[-1]) for t in (keys, values))
            for space, old in zip(spaces, self._space or (), strict=False):
                space[..., : self._length, :] = old[..., : self._length, :]
            self._space = (spaces[0], spaces[1])
        return self._space


def slot_cache(config: Any) -> Cache:
    """An empty cache; layers with states of their own are transformers'.

    Layers with a sliding window keep what has left the window: the model's masks hide it, and a prompt that shares a
    beginning with the last one can go on from any place in it.
    """
    cache = DynamicCache(config=config)
    replaceable = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [SlotLayer() if type(layer) in replaceable else layer for layer in cache.layers]
    return cache


def can_be_cut(cache: Cache) -> bool:
    """Whether any prefix of what the cache holds can be kept."""
    return bool(cache.layers) and all(isinstance(layer, SlotLayer) for layer in cache.layers)


def cut(cache: Cache, length: int) -> None:
    """Keeps the first `length` tokens of a cache that can be cut."""
    for layer in cache.layers:
        layer.cut(length)
