"""ElasticZO in two phases: while the trunk is frozen its output for an example never changes, so it is computed once.

Phase 1 trains the last k blocks and the head by BP from cached trunk states (`Backpropagation` on the suffix, within
this cache); phase 2 moves the trunk by MeZO with the suffix frozen, and the cache is worth nothing any more.
"""

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from agentd.learn.weights.structure import split


class CachedTrunk:
    """Keeps what enters the last k blocks, for every mini-batch by a key that the caller gives.

    Raises ValueError for a k that leaves no trunk or no block above it.
    """

    def __init__(self, model: nn.Module, k: int) -> None:
        self.split = split(model, k)
        if not 0 < k < len(self.split.blocks):
            raise ValueError(f"k = {k} leaves no trunk to cache, or nothing to cache it for")
        self._states: dict[Hashable, Tensor] = {}
        self._tuples = False

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return sum(state.numel() * state.element_size() for state in self._states.values())

    @contextlib.contextmanager
    def batch(self, key: Hashable) -> Iterator[None]:
        """Within it forwards of the model are those of mini-batch `key`. The first runs the trunk."""
        blocks, first = self.split.blocks[: self.split.first], self.split.blocks[self.split.first]
        with contextlib.ExitStack() as undo:
            if key in self._states:
                for block in blocks:
                    vars(block)["forward"] = self._skip
                    undo.callback(vars(block).pop, "forward", None)
                hook = self._replay(self._states[key])
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

    def _record(self, key: Hashable) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._states[key] = hidden.detach()
            return _with(self._states[key], args, kwargs)

        return hook

    def _replay(self, state: Tensor) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _with(state, args, kwargs)

        return hook


def _with(state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if torch.is_grad_enabled() and not state.is_leaf:
        state = state.detach()
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
