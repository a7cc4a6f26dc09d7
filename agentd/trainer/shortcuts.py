"""Work that cannot matter is left out: the shared prefix runs once, and the last block runs where it is scored.

Neither is assumed to be possible. Each is tried on the model itself with random input when training starts, and used
only where the scored outputs stay the same; whatever the architecture, the result is that of the plain computation.
"""

from typing import Any

import torch
from torch import nn

from agentd.trainer.blocks import Blocks

_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)


class Scored:
    """The rows that are scored in the forward pass to come, as indices into its flattened (sequences x tokens).

    They stay until the next forward pass: a block that is recomputed for its gradient needs them again.
    """

    rows: torch.Tensor | None = None


class AtScoredRows(nn.Module):
    """Runs a position-wise module at the scored rows only; the others get zeros, which nobody reads."""

    def __init__(self, module: nn.Module, scored: Scored) -> None:
        super().__init__()
        self.module, self.scored = module, scored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.scored.rows
        if rows is None:
            whole: torch.Tensor = self.module(x)
            return whole
        some = self.module(x.flatten(0, 1)[rows][None])[0]
        out: torch.Tensor = some.new_zeros(x.shape[0] * x.shape[1], some.shape[-1])
        return out.index_copy(0, rows, some).view(*x.shape[:2], -1)


class Suffix:
    """Runs the blocks that are in memory: to the model's end, with the hidden states where terms are scored, or not."""

    def __init__(self, blocks: Blocks, shared_prefix: bool = True, scored_rows: bool = True) -> None:
        self.blocks = blocks
        self.scored = Scored()
        self.shares_prefix = shared_prefix and self._can_share_prefix()
        with blocks.only_last():
            self.reduced = self._reduce(blocks.last, "") if scored_rows else []
        self.scored.rows = None

    def __call__(self, prefix: torch.Tensor, inputs: torch.Tensor, at: list[tuple[int, int]]) -> torch.Tensor:
        """(len(at), n_embd): the last block's output at every (sequence, position).

        prefix  (1, p, n_embd), the rows every sequence begins with
        inputs  (sequences, tokens, n_embd), what follows; positions count from the start of the prefix
        """
        n = prefix.shape[1]
        if n and self.shares_prefix and all(position >= n for _, position in at):
            return self._with_cache(prefix, inputs, [(s, position - n) for s, position in at])
        whole = torch.cat([prefix.expand(len(inputs), -1, -1), inputs], dim=1) if n else inputs
        return self._pick(whole, at, None)

    def all_rows(self, prefix: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What comes out for every row: of `inputs`, and of `prefix` (1, p, n_embd) if it has rows.

        For blocks below the last one; nothing is left out.
        """
        n = prefix.shape[1]
        if not n:
            return (self.blocks.run(inputs),)
        if not self.shares_prefix:
            whole = self.blocks.run(torch.cat([prefix.expand(len(inputs), -1, -1), inputs], dim=1))
            return whole[:, n:], whole[:1, :n]
        cache = self._cache()
        shared = self.blocks.run(prefix, cache)
        cache.batch_repeat_interleave(len(inputs))
        return self.blocks.run(inputs, cache), shared

    def _cache(self) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.blocks.config)

    def _with_cache(self, prefix: torch.Tensor, inputs: torch.Tensor, at: list[tuple[int, int]]) -> torch.Tensor:
        cache = self._cache()
        self.scored.rows = torch.empty(0, dtype=torch.long)
        self.blocks.run(prefix, cache)
        cache.batch_repeat_interleave(len(inputs))
        return self._pick(inputs, at, cache)

    def _pick(self, inputs: torch.Tensor, at: list[tuple[int, int]], cache: Any) -> torch.Tensor:
        rows = torch.tensor([s * inputs.shape[1] + position for s, position in at])
        self.scored.rows = rows
        return self.blocks.run(inputs, cache).flatten(0, 1)[rows]

    def _can_share_prefix(self) -> bool:
        generator = torch.Generator().manual_seed(1)
        prefix = torch.randn(1, 4, self.blocks.n_embd, generator=generator)
        inputs = torch.randn(3, 5, self.blocks.n_embd, generator=generator)
        at = [(s, 4 + position) for s in range(3) for position in range(5)]
        try:
            with torch.no_grad():
                shared = self._with_cache(prefix, inputs, [(s, p - 4) for s, p in at])
                plain = self._pick(torch.cat([prefix.expand(3, -1, -1), inputs], dim=1), at, None)
        except _FAILURES:
            return False
        return torch.allclose(shared, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())

    def _reduce(self, module: nn.Module, name: str) -> list[str]:
        """Wraps the outermost submodules that are position-wise and whose other outputs reach no scored row.

        Found by dataflow: NaN goes in and comes out at every row that is not scored, and must not arrive.
        """
        reduced = []
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}".lstrip(".")
            if self._is_position_wise(child):
                setattr(module, child_name, AtScoredRows(child, self.scored))
                reduced.append(path)
            else:
                reduced += self._reduce(child, path)
        return reduced

    def _is_position_wise(self, child: nn.Module) -> bool:
        shape, at = (3, 7), [(0, 4), (1, 6), (1, 2), (2, 3)]
        inputs = torch.randn(*shape, self.blocks.n_embd, generator=torch.Generator().manual_seed(2))
        hidden_rows = torch.ones(shape, dtype=torch.bool)
        hidden_rows[tuple(torch.tensor(at).T)] = False
        calls: list[None] = []

        def poison(tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor) or tensor.shape[:2] != shape or not tensor.is_floating_point():
                raise TypeError("not a module of one tensor")
            return tensor.masked_fill(hidden_rows.view(*shape, *[1] * (tensor.dim() - 2)), torch.nan)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if len(args) != 1 or kwargs:
                raise TypeError("not a module of one tensor")
            calls.append(None)
            return (poison(args[0]),), kwargs

        with torch.no_grad():
            clean = self._pick(inputs, at, None)
            hooks = [
                child.register_forward_pre_hook(before, with_kwargs=True),
                child.register_forward_hook(lambda _, __, output: poison(output)),
            ]
            try:
                poisoned = self._pick(inputs, at, None)
            except _FAILURES:
                return False
            finally:
                for hook in hooks:
                    hook.remove()
        return len(calls) == 1 and torch.allclose(clean, poisoned, rtol=1e-4, atol=1e-5 * clean.abs().max().item())
