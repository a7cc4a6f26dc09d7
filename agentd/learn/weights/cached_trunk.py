"""ElasticZO in two phases: while the trunk is frozen its output for an example never changes, so it is computed once.

Phase 1 trains the last k blocks and the head by BP from cached trunk states (`Backpropagation` on the suffix, within
this cache); phase 2 moves the trunk by MeZO with the suffix frozen, and the cache is worth nothing any more.
"""

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from agentd.learn.weights.structure import split

Key = TypeVar("Key", contravariant=True)


class States(Protocol[Key]):
    """What enters the last blocks, by mini-batch: (batch, tokens, D)."""

    def knows(self, key: Key) -> bool: ...
    def put(self, key: Key, state: Tensor) -> None: ...

    def get(self, key: Key, like: Tensor) -> Tensor:
        """In the shape, type and place of `like`."""


class InMemory:
    """Keeps them as they are, for mini-batches that always have the same examples."""

    def __init__(self) -> None:
        self._states: dict[Hashable, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(state.numel() * state.element_size() for state in self._states.values())

    def knows(self, key: Hashable) -> bool:
        return key in self._states

    def put(self, key: Hashable, state: Tensor) -> None:
        self._states[key] = state

    def get(self, key: Hashable, like: Tensor) -> Tensor:
        return self._states[key]


class CachedTrunk:
    """Runs the trunk below the last k blocks once for every mini-batch, by a key that the caller gives.

    Raises ValueError for a k that leaves no trunk or no block above it.
    """

    def __init__(self, model: nn.Module, k: int, states: States[Any]) -> None:
        self.split = split(model, k)
        if not 0 < k < len(self.split.blocks):
            raise ValueError(f"k = {k} leaves no trunk to cache, or nothing to cache it for")
        self._states = states
        self._tuples = False

    @contextlib.contextmanager
    def batch(self, key: Any) -> Iterator[None]:
        """Within it forwards of the model are those of mini-batch `key`. The first runs the trunk."""
        blocks, first = self.split.blocks[: self.split.first], self.split.blocks[self.split.first]
        with contextlib.ExitStack() as undo:
            if self._states.knows(key):
                for block in blocks:
                    vars(block)["forward"] = self._skip
                    undo.callback(vars(block).pop, "forward", None)
                hook = self._replay(key)
            else:
                for block in blocks[-1:]:
                    undo.callback(block.register_forward_hook(self._see).remove)
                hook = self._record(key)
            undo.callback(first.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _skip(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if self._tuples else hidden

    def _see(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._tuples = isinstance(output, tuple)

    def _record(self, key: Any) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = (args[0] if args else kwargs["hidden_states"]).detach()
            self._states.put(key, state)
            return _with(state, args, kwargs)

        return hook

    def _replay(self, key: Any) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _with(self._states.get(key, args[0] if args else kwargs["hidden_states"]), args, kwargs)

        return hook


def _with(state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if torch.is_grad_enabled() and not state.is_leaf:
        state = state.detach()
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
