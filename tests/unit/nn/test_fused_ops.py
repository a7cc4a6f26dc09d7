"""A part of a block is replaced where values and gradients stay the same, and only there."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from agentd.nn.fused_ops import fuse

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
}


def randomised(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return block


def gradient(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    own = x.clone().requires_grad_()
    y = module(own)
    torch.autograd.backward((y * torch.arange(y.numel()).view_as(y) / y.numel()).sum())
    assert own.grad is not None
    return y.detach(), own.grad


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_norm_and_gated_activation_of_a_llama_block(scale: float) -> None:
    config = LlamaConfig(**SIZES)
    plain, fused = randomised(LlamaDecoderLayer(config, 0)), randomised(LlamaDecoderLayer(config, 0))
    other = randomised(LlamaDecoderLayer(config, 1))
    assert sorted(fuse([fused, other], fused)) == ["input_layernorm", "mlp", "post_attention_layernorm"]
    x = scale * torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    for name in ("input_layernorm", "mlp", "post_attention_layernorm"):
        expected = gradient(plain.get_submodule(name), x)
        for block in (fused, other):
            for ours, theirs in zip(gradient(block.get_submodule(name), x), expected, strict=True):
                assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_what_computes_something_else_stays_as_it_is() -> None:
    """Gemma's norm multiplies by 1 + weight, and its activation is another."""
    block = randomised(GemmaDecoderLayer(GemmaConfig(**SIZES), 0))
    assert fuse([block], block) == []
    x = torch.randn(1, 2, 24)
    plain = randomised(GemmaDecoderLayer(GemmaConfig(**SIZES), 0))
    assert torch.equal(block.get_submodule("mlp")(x), plain.get_submodule("mlp")(x))


def test_only_modules_of_the_same_kind_are_replaced() -> None:
    class Other(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    sample, other = nn.ModuleDict({"norm": LlamaRMSNorm(8)}), nn.ModuleDict({"norm": Other(8)})
    assert fuse([sample, other], sample) == ["norm"]
    assert torch.equal(other["norm"](torch.ones(1, 8)), torch.full((1, 8), 2.0))
