"""How a zeroth-order step moves weights: what a ledger's steps mean, wherever they are taken, stored or replayed."""

from dataclasses import asdict, dataclass
from typing import Any

DISTRIBUTIONS = ("rademacher", "gaussian")


@dataclass(frozen=True)
class UpdateRule:
    """theta <- theta + coefficient m z. Raises ValueError for values out of range.

    distribution  of z, one of DISTRIBUTIONS
    sparsity      the part of each matrix that stays as it is, in (0, 1): its largest entries, where the mask m is 0
                  (sparse MeZO, Liu et al. 2024). 0.75 moves a quarter; None moves everything
    """

    distribution: str = "rademacher"
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution {self.distribution!r} is none of {', '.join(DISTRIBUTIONS)}")
        sparsity = self.sparsity
        if sparsity is not None and not (isinstance(sparsity, float) and 0 < sparsity < 1):
            raise ValueError(f"sparsity {sparsity!r} is not between 0 and 1")

    @classmethod
    def from_json(cls, tree: Any) -> "UpdateRule":
        """The rule in the object that `as_json` makes. Raises ValueError."""
        if not isinstance(tree, dict) or set(tree) != {"distribution", "sparsity"}:
            raise ValueError("it has no usable update")
        return cls(**tree)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
