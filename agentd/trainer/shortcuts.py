"""Work that cannot matter is left out: what answers share runs once, and the last block runs where it is scored.

Neither is assumed to be possible. Each is tried on the model itself with random input when training starts, and used
only where the scored outputs stay the same; for any architecture, the result is that of the plain computation.
"""

from typing import Any

import torch
from torch import nn

from agentd.nn.blocks import Blocks
from agentd.nn.linear_ops import exactly
from agentd.nn.tree_mask import Tree

_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)
_ROUNDING = 1e-3
_SHAPE, _AT = (3, 7), ((0, 4), (1, 6), (1, 2), (2, 3))  # what is tried: sequences and tokens, and where they are scored


class Scored:
    """The rows that are scored in the forward pass to come, as indices into its flattened (sequences x tokens).

    They stay until the next forward pass: a block that is recomputed for its gradient needs them again.
    """

    rows: torch.Tensor | None = None


class AtScoredRows(nn.Module):
    """Runs a position-wise module at the scored rows only; the others get zeros, which no one reads."""

    def __init__(self, module: nn.Module, scored: Scored) -> None:
        super().__init__()
        self.module, self.scored = module, scored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.scored.rows
        if rows is None:
            whole: torch.Tensor = self.module(x)
            return whole
        some = self.module(x.flatten(0, 1)[rows][None])[0]
        out: torch.Tensor = some.new_zeros(x.shape[0] * x.shape[1], *some.shape[1:])
        return out.index_copy(0, rows, some).view(*x.shape[:2], *some.shape[1:])


class Suffix:
    """Runs the blocks that are in memory: to the model's end, with the hidden states where terms are scored, or not."""

    def __init__(self, blocks: Blocks, scored_rows: bool = True) -> None:
        self.blocks = blocks
        self.scored = Scored()
        with exactly():
            self.shares = self._obeys_trees()
            if not self.shares:
                blocks.apart = False
                self.shares = self._obeys_trees()
            with blocks.only_last():
                self.reduced = self._reduce(blocks.last, "") if scored_rows else []
        self.scored.rows = None

    def __call__(self, inputs: torch.Tensor, tree: Tree | None, rows: torch.Tensor) -> torch.Tensor:
        """(len(rows), n_embd): the last block's output at `rows` of the flattened input (rows x tokens)."""
        self.scored.rows = rows
        return self.blocks.run(inputs, tree).flatten(0, 1)[rows]

    def all_rows(self, inputs: torch.Tensor, tree: Tree | None) -> torch.Tensor:
        """What comes out for every row of `inputs`. For blocks below the last one; nothing is left out."""
        return self.blocks.run(inputs, tree)

    def _obeys_trees(self) -> bool:
        """Whether answers may share their text's rows: two texts in one row, and every answer in a row of its own."""
        generator = torch.Generator().manual_seed(1)

        def states(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, self.blocks.n_embd, generator=generator)

        n = 6  # of the prefix: enough for it to attend apart
        prefix, texts, answers = states(n), [states(3), states(1)], [[states(2), states(4)], [states(0), states(1)]]
        tree = Tree.of(n, [(len(text), [len(own) for own in each]) for text, each in zip(texts, answers, strict=True)])
        together = torch.cat([prefix, *(torch.cat([t, *each]) for t, each in zip(texts, answers, strict=True))])
        try:
            with torch.no_grad():
                shared = self.blocks.run(together[None], tree)[0]
                alone, at = [], 0
                for text, each in zip(texts, answers, strict=True):
                    begin = n + at
                    own = begin + len(text)
                    for answer in each:
                        plain = self.blocks.run(torch.cat([prefix, text, answer])[None])[0]
                        rows = [*range(n), *range(begin, begin + len(text)), *range(own, own + len(answer))]
                        alone.append((shared[rows], plain))
                        own += len(answer)
                    at = own - n
        except _FAILURES:
            return False
        return all(_alike(ours, plain) for ours, plain in alone)

    def _reduce(self, module: nn.Module, name: str) -> list[str]:
        """Wraps the outermost submodules that are position-wise and whose other outputs reach no scored row.

        Found by dataflow: NaN goes in and comes out at every row that is not scored, and must not arrive.
        """
        reduced = []
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}".lstrip(".")
            if self._is_position_wise(child) and self._can_replace(module, child_name, child):
                reduced.append(path)
            else:
                reduced += self._reduce(child, path)
        return reduced

    def _can_replace(self, module: nn.Module, name: str, child: nn.Module) -> bool:
        """Replaces it, unless its owner asks more of it than to run."""
        inputs, rows = self._tried()
        with torch.no_grad():
            before = self(inputs, None, rows)
            setattr(module, name, AtScoredRows(child, self.scored))
            try:
                after = self(inputs, None, rows)
                if _alike(after, before):
                    return True
            except _FAILURES:
                pass
        setattr(module, name, child)
        return False

    def _tried(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random input, and the rows of it that are scored."""
        inputs = torch.randn(*_SHAPE, self.blocks.n_embd, generator=torch.Generator().manual_seed(2))
        return inputs, torch.tensor([s * _SHAPE[1] + position for s, position in _AT])

    def _is_position_wise(self, child: nn.Module) -> bool:
        shape, (inputs, rows) = _SHAPE, self._tried()
        hidden_rows = torch.ones(shape, dtype=torch.bool)
        hidden_rows.view(-1)[rows] = False
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
            clean = self(inputs, None, rows)
            hooks = [
                child.register_forward_pre_hook(before, with_kwargs=True),
                child.register_forward_hook(lambda _, __, output: poison(output)),
            ]
            try:
                poisoned = self(inputs, None, rows)
            except _FAILURES:
                return False
            finally:
                for hook in hooks:
                    hook.remove()
        return len(calls) == 1 and _alike(poisoned, clean)


def _alike(ours: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether every row is the same but for rounding. (rows, n) each.

    The length of the difference beside that of the row: thirty blocks in float32 bring it to 3e-5, one token too many
    in what another sees to a third.
    """
    return bool(((ours - plain).norm(dim=-1) <= _ROUNDING * plain.norm(dim=-1)).all())
