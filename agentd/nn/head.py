"""The final norm and the vocabulary head, applied where a term is scored, a slice of the vocabulary at a time."""

from typing import Any

import torch
from torch import nn

from agentd.nn.blocks import Blocks
from agentd.nn.linear_ops import exactly
from agentd.nn.matrix import Matrix
from agentd.nn.meta_model import Unsupported


class Head:
    """log p(token | hidden state) for the model's own head: tied or not, scaled, soft-capped, with or without bias.

    The matrix stays in the file; every pass over the vocabulary dequantises it again, which takes less time than
    multiplying with it. Raises Unsupported if transformers' own head computes something else.
    """

    def __init__(self, blocks: Blocks) -> None:
        file, config = blocks.file, blocks.config
        name = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        if name not in file.tensors:
            raise Unsupported(file.path, "the file has no vocabulary matrix")
        self.norm = blocks.norm
        self.matrix = Matrix(file, name)
        self.bias = file.load("output.bias") if "output.bias" in file.tensors else None
        self.scale = float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0)
        self._check(blocks)

    @property
    def n_vocab(self) -> int:
        return len(self.matrix)

    def log_likelihoods(self, hidden: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """log p(token[i] | hidden[row[i]]), shape (terms,), for the blocks' output `hidden` (positions, n_embd)."""
        arguments = (self.norm(hidden), row, token, self.matrix, self.bias, self.scale, self.softcap)
        terms: torch.Tensor = _LogLikelihoods.apply(*arguments)  # type: ignore[no-untyped-call]
        return terms

    def _check(self, blocks: Blocks) -> None:
        """Compares with transformers' own model on a vocabulary of a few tokens."""
        few = min(16, self.n_vocab)
        own = blocks.model.get_output_embeddings()
        if not isinstance(own, nn.Linear) or (own.bias is None) != (self.bias is None):
            raise Unsupported(blocks.file.path, "its head is not a single matrix")
        small = nn.Linear(blocks.n_embd, few, bias=self.bias is not None)
        small.weight.data = self.matrix.part(0, few)
        if self.bias is not None:
            small.bias.data = self.bias[:few]
        inputs = torch.randn(1, 3, blocks.n_embd, generator=torch.Generator().manual_seed(0)) / blocks.entry
        blocks.model.set_output_embeddings(small)
        try:
            with torch.no_grad(), exactly():
                theirs = blocks.model(inputs_embeds=inputs).logits[0]
                hidden = blocks.run(inputs / blocks.entry)[0]
                ours = _cap(
                    hidden @ small.weight.T * self.scale + (0 if self.bias is None else small.bias), self.softcap
                )
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise Unsupported(blocks.file.path, f"its head does not run: {error}") from error
        if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
            raise Unsupported(blocks.file.path, "its head computes something that is not known here")


def _cap(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _LogLikelihoods(torch.autograd.Function):
    """Logits minus logsumexp over the vocabulary, without the logits ever being there together.

    The derivative of logsumexp by the hidden state is the softmax's mean of the head's rows; it is summed up during
    the same pass over the vocabulary, as in flash attention, so that the backward pass needs no second one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        row: torch.Tensor,
        token: torch.Tensor,
        matrix: Matrix,
        bias: torch.Tensor | None,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        n, width = hidden.shape
        top = hidden.new_full((n, 1), -torch.inf)
        total = hidden.new_zeros(n, 1)
        mean = hidden.new_zeros(n, width) if wants_gradient else None
        for begin, end, part in matrix.parts():
            logits = hidden @ part.T
            if scale != 1:
                logits *= scale
            if bias is not None:
                logits += bias[begin:end]
            logits = _cap(logits, softcap)
            higher = torch.maximum(top, logits.amax(dim=1, keepdim=True))
            shrink = torch.exp(top - higher)
            top = higher
            slope = 1 - (logits / softcap) ** 2 if softcap and mean is not None else None
            weights = logits.sub_(top).exp_()
            total = total * shrink + weights.sum(dim=1, keepdim=True)
            if mean is not None:
                mean = torch.addmm(mean.mul_(shrink), weights if slope is None else weights * slope, part)
        chosen = matrix.pick(token)
        logits = (hidden[row] * chosen).sum(dim=1) * scale
        if bias is not None:
            logits = logits + bias[token]
        logits = _cap(logits, softcap)
        if mean is not None:
            slope = 1 - (logits / softcap) ** 2 if softcap else torch.ones_like(logits)
            ctx.save_for_backward(row, chosen, mean.div_(total), slope)
            ctx.scale = scale
        return logits - (top + total.log())[row, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        row, chosen, mean, slope = ctx.saved_tensors
        (gradient,) = gradients
        by_row = gradient.new_zeros(len(mean)).index_add_(0, row, gradient)
        by_hidden = mean * -by_row[:, None]
        by_hidden.index_add_(0, row, chosen * (gradient * slope)[:, None])
        return by_hidden.mul_(ctx.scale), None, None, None, None, None, None
