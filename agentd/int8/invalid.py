"""What can be wrong with what a caller hands in. All are ValueErrors; each builds its own message."""

from collections.abc import Sequence


class InvalidArchitecture(ValueError):
    """A network description that cannot be built."""

    def __init__(self, name: str, reason: str, layer: int | None = None) -> None:
        where = "" if layer is None else f", layer {layer + 1}"
        super().__init__(f"architecture {name!r}{where}: {reason}")


class InvalidInput(ValueError):
    """An input array of the wrong shape or dtype, empty, or with entries that are not finite."""


class InvalidLabels(ValueError):
    """Labels that are not one class index per example."""


class InvalidWeights(ValueError):
    """Weights that do not fit the architecture; every mistake at once."""

    def __init__(self, source: object, problems: Sequence[str]) -> None:
        super().__init__(f"the weights of {source} do not fit: " + "; ".join(problems))
        self.problems = list(problems)
