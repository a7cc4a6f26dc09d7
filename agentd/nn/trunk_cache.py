"""While the trunk is frozen its output for an example never changes, so it is computed once.

Backpropagation in the last k blocks goes on from what is kept here. As soon as a zeroth-order step moves the trunk, the
cache is worth nothing any more.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from agentd.nn.forward_patch import replaced
from agentd.nn.structure import split

Forward = Callable[..., Any]
Key = TypeVar("Key", contravariant=True)


class States(Protocol[Key]):
    """What enters the last blocks, by mini-batch: (batch, tokens, D)."""

    def knows(self, key: Key) -> bool: ...
    def put(self, key: Key, state: Tensor) -> None: ...

    def get(self, key: Key, like: Tensor) -> Tensor:
        """In the shape, type and place of `like`."""


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
        if self._states.knows(key):
            new = [(block, self._skip) for block in blocks]
            new.append((first, _entering(first.forward, lambda state: self._states.get(key, state))))
        else:
            new = [(block, self._seen(block.forward)) for block in blocks[-1:]]
            new.append((first, _entering(first.forward, lambda state: self._put(key, state))))
        with replaced(new):
            yield

    def _skip(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if self._tuples else hidden

    def _seen(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._tuples = isinstance(output, tuple)
            return output

        return run

    def _put(self, key: Any, state: Tensor) -> Tensor:
        self._states.put(key, state)
        return state


def _entering(forward: Forward, state_of: Callable[[Tensor], Tensor]) -> Forward:
    """`forward` of a block, into which goes what `state_of` makes of its input, without a gradient."""

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        return forward(state_of(hidden.detach()).detach(), *args, **kwargs)

    return run
