"""Attention for many answers to one text in one row: each token sees its own text and its own answer, and no other.

Positions are logical: an answer's first token follows the text's last one, wherever it stands in the row. A model's
own masks (causal, sliding windows, chunks) are asked with these positions, so they hold as they do in a sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from agentd.limits import attends_apart

_SDPA = "sdpa"  # transformers' name of the implementation by torch's own kernels


@dataclass(frozen=True)
class Tree:
    """What the tokens of one row see, and where they stand.

    positions  (1, n): where each of the row's n tokens stands in its sequence
    sees       (n, n): whether a token sees another one, as far as the model's own mask lets it
    prefix     tokens at the row's beginning that all others see
    """

    positions: torch.Tensor
    sees: torch.Tensor
    prefix: int

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
        return cls(torch.tensor([positions]), (owners == -1) | same, prefix)

    @contextmanager
    def attended(self, config: Any, *, apart: bool = True) -> Iterator[dict[str, Any]]:
        """Within it a model of this configuration attends along the tree, with these arguments to its forward.

        apart  the prefix attends to itself alone, where its mask is the causal one: torch's kernel computes half of
               that, and nothing of what a mask hides. Only for a model that leaves attention to transformers' interface
        """
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

        name = config._attn_implementation
        plain_mask, plain_attention = MASKS[name], ATTENTIONS[_SDPA]
        pays = attends_apart(self.prefix, self.positions.shape[1])
        prefix = self.prefix if apart and pays and name == _SDPA else 0

        def masked(*, mask_function: Any, allow_is_causal_skip: bool = False, **rest: Any) -> Any:
            def along(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                at = self.positions[0]
                allowed: torch.Tensor = mask_function(batch, head, at[query], at[key]) & self.sees[query, key]
                return allowed

            mask = plain_mask(mask_function=along, allow_is_causal_skip=False, **rest)
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
                if prefix and bool((mask[..., :prefix, :prefix] == torch.ones(prefix, prefix).tril().bool()).all()):
                    mask = mask[..., prefix:, :]
                # Attention computes with numbers: made of truth values by each block, each would keep its own.
                mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
            return mask

        def attention(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **rest: Any
        ) -> tuple[torch.Tensor, Any]:
            n = query.shape[-2]
            if not isinstance(mask, torch.Tensor) or mask.shape[-2] == n:
                whole: tuple[torch.Tensor, Any] = plain_attention(module, query, key, value, mask, **rest)
                return whole
            first = (part[..., :prefix, :] for part in (query, key, value))
            of_prefix, _ = plain_attention(module, *first, None, **{**rest, "is_causal": True})
            if mask.shape[-2] == 0:
                return of_prefix, None
            others, _ = plain_attention(module, query[..., prefix:, :], key, value, mask, **rest)
            return torch.cat([of_prefix, others], dim=1), None

        MASKS[name] = masked
        if prefix:
            ATTENTIONS[name] = attention
        try:
            # With a mask of its own a model does not take jumps of the positions for the ends of sequences.
            everything = torch.ones(self.positions.shape, dtype=torch.bool)
            yield {"position_ids": self.positions, "attention_mask": everything}
        finally:
            del MASKS[name]
            if prefix:
                del ATTENTIONS[name]
