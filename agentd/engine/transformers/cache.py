"""The KV cache of one slot: it grows in steps, and is cut back to a prefix when the next prompt shares one.

It can be written down as bytes and read again: numbers that say what follows, then the keys and values of every layer.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from agentd.engine.prefixes import State

_STEP = 256  # tokens by which it grows
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NUMBER = np.dtype("<i8")
_NUMBERS = 3  # of keys, and of values: their type, heads and width


class SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values (1, heads, tokens, width) of one layer, written in place.

    transformers' own layer makes a new tensor for every token, which costs a copy of the whole cache each time.
    `window`: how many tokens, itself included, one of them sees.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
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

    def recent(self, states: torch.Tensor, n: int) -> torch.Tensor:
        """Of keys or values those that the last `n` tokens see."""
        return states if self.window is None else states[..., -(self.window + n - 1) :, :]

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
    cache.layers = [
        SlotLayer(getattr(layer, "sliding_window", None)) if type(layer) in replaceable else layer
        for layer in cache.layers
    ]
    return cache


def can_be_cut(cache: Cache) -> bool:
    """Whether any prefix of what the cache holds can be kept."""
    return bool(cache.layers) and all(isinstance(layer, SlotLayer) for layer in cache.layers)


def cut(cache: Cache, length: int) -> None:
    """Keeps the first `length` tokens of a cache that can be cut."""
    for layer in cache.layers:
        layer.cut(length)


def written(cache: Cache) -> State:
    """What a cache holds that can be cut."""
    both = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    shapes = [(_DTYPES.index(each.dtype), each.shape[1], each.shape[3]) for each in both]
    head = np.array([len(both), cache.get_seq_length(), *(n for shape in shapes for n in shape)], _NUMBER)
    state = np.empty(head.nbytes + sum(each.nbytes for each in both), np.uint8)
    state[: head.nbytes] = head.view(np.uint8)
    for part, states in zip(_parts(state), both, strict=True):
        part.copy_(states)
    return state


def read(config: Any, state: State, device: torch.device) -> Cache:
    """A cache that holds what was written. Raises ValueError where it is none of this model."""
    cache = slot_cache(config)
    parts = list(_parts(state))
    if len(parts) != 2 * len(cache.layers):
        raise ValueError("it has another number of layers")
    with torch.inference_mode():
        for layer, keys, values in zip(cache.layers, parts[::2], parts[1::2], strict=True):
            layer.update(keys.to(device), values.to(device))
    return cache


def _parts(state: State) -> Iterator[torch.Tensor]:
    """The keys and values of every layer in what was written, as views of it."""
    count, length = state[: 2 * _NUMBER.itemsize].view(_NUMBER).tolist()
    at = _NUMBER.itemsize * (2 + _NUMBERS * count)
    numbers = state[2 * _NUMBER.itemsize : at].view(_NUMBER).reshape(count, _NUMBERS)
    for kind, heads, width in numbers.tolist():
        size = heads * length * width * _DTYPES[kind].itemsize
        yield torch.from_numpy(state[at : at + size]).view(_DTYPES[kind]).view(1, heads, length, width)
        at += size
