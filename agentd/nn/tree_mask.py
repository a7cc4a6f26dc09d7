"""Attention for many answers to one text in one row: each token sees its own text and its own answer, and no other.

Positions are logical: an answer's first token follows the text's last one, wherever it stands in the row. A model's
own masks (causal, sliding windows, chunks) are asked with these positions, so they hold as they do in a sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tree:
    """positions (1, n): where each of the row's n tokens stands in its sequence; sees (n, n): whether it sees another
    one, as far as the model's own mask lets it."""

    positions: torch.Tensor
    sees: torch.Tensor

    @classmethod
    def of(cls, prefix: int, examples: Sequence[tuple[int, Sequence[int]]]) -> "Tree":
        """A row of `prefix` tokens, then per example what its answers share and what each has of its own, as numbers of
        tokens."""
        positions = list(range(prefix))
        owner, branch = [-1] * prefix, [0] * prefix
        for i, (shared, own) in enumerate(examples):
            for number, (begin, n) in enumerate([(prefix, shared), *((prefix + shared, n) for n in own)]):
                positions += range(begin, begin + n)
                owner += [i] * n
                branch += [number] * n
        owners, branches = torch.tensor(owner), torch.tensor(branch)
        same = (owners[:, None] == owners) & ((branches == 0) | (branches[:, None] == branches))
        return cls(torch.tensor([positions]), (owners == -1) | same)

    @contextmanager
    def attended(self, config: Any) -> Iterator[dict[str, Any]]:
        """Within it a model of this configuration attends along the tree, with these arguments to its forward."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

        name = config._attn_implementation
        plain = MASKS[name]

        def masked(*, mask_function: Any, allow_is_causal_skip: bool = False, **rest: Any) -> Any:
            def along(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                at = self.positions[0]
                allowed: torch.Tensor = mask_function(batch, head, at[query], at[key]) & self.sees[query, key]
                return allowed

            mask = plain(mask_function=along, allow_is_causal_skip=False, **rest)
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
                # Attention computes with numbers: made of truth values by each block, each would keep its own.
                mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
            return mask

        MASKS[name] = masked
        try:
            # With a mask of its own a model does not take jumps of the positions for the ends of sequences.
            everything = torch.ones(self.positions.shape, dtype=torch.bool)
            yield {"position_ids": self.positions, "attention_mask": everything}
        finally:
            del MASKS[name]
