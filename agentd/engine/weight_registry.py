"""What an engine holds beside its base, by name, and who still needs which."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from agentd.engine.protocol import BASE, Weights
from agentd.errors import RevisionCorrupt

W = TypeVar("W")
"""What an engine makes of a revision: adapters, or whole weights. Compared by identity."""
W_co = TypeVar("W_co", covariant=True)


class WeightsSource(Protocol[W_co]):
    """Where serving has weights from."""

    def __getitem__(self, weights: Weights) -> W_co:
        """Raises RevisionCorrupt."""

    def collect(self) -> None:
        """Frees what is not needed any more."""


class Single(Generic[W]):
    """The same weights by every name; others see to it that they stay."""

    def __init__(self, weights: W) -> None:
        self._weights = weights

    def __getitem__(self, weights: Weights) -> W:
        return self._weights

    def collect(self) -> None:
        """There is nothing else."""


class WeightRegistry(Generic[W]):
    """What was replaced or removed is freed as soon as no one computes with it any more."""

    def __init__(self, base: W, in_use: Callable[[W], bool], free: Callable[[W], None]) -> None:
        self._in_use, self._free = in_use, free
        self._by_name: dict[Weights, W] = {BASE: base}
        self._retired: list[W] = []

    def __getitem__(self, weights: Weights) -> W:
        """Raises RevisionCorrupt."""
        try:
            return self._by_name[weights]
        except KeyError:
            raise RevisionCorrupt(weights, "it is not staged") from None

    def __contains__(self, weights: Weights) -> bool:
        return weights in self._by_name

    def put(self, weights: Weights, item: W) -> None:
        self.remove(weights)
        self._by_name[weights] = item

    def remove(self, weights: Weights) -> None:
        if weights in self._by_name:
            self._retired.append(self._by_name.pop(weights))
        self.collect()

    def collect(self) -> None:
        """Frees what is not needed any more."""
        if not self._retired:
            return
        in_use = [item for item in self._retired if self._in_use(item)]
        for item in self._retired:
            if not any(item is other for other in in_use):
                self._free(item)
        self._retired = in_use

    def values(self) -> list[W]:
        """Everything that is held, what is retired included."""
        return [*self._by_name.values(), *self._retired]

    @property
    def names(self) -> list[Weights]:
        return list(self._by_name)

    @property
    def retired(self) -> int:
        """How many were removed and are still computed with."""
        return len(self._retired)
