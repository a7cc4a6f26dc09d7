"""Families of which every block is attention and a feed-forward part."""

from tools.shapes.model import WINDOW, Model


def plain(model: Model, *, bias: bool = False, qk_norm: str = "") -> None:
    """Norms before attention and feed-forward, SwiGLU: what most families vary."""
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block, bias=bias, qk_norm=qk_norm)
        model.norm(f"{block}.ffn_norm")
        model.feed_forward(block)
    model.end()


def llama3(model: Model) -> None:
    """Rope frequencies are divided, the low ones by 32."""
    model.metadata["rope.freq_base"] = 5e5
    half = model.size.head_dim // 2
    model.add("rope_freqs.weight", half, kind="values", values=[1.0] * (half // 2) + [32.0] * (half - half // 2))
    plain(model)


def mistral3(model: Model) -> None:
    original = 64 if model.size.is_tiny else 16384
    model.metadata |= {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.yarn_log_multiplier": 1.0,
        "attention.temperature_scale": 0.1,
    }
    plain(model)


def granite(model: Model) -> None:
    granite_scales(model)
    plain(model)


def granite_scales(model: Model) -> None:
    model.metadata |= {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.scale": 1 / model.size.head_dim,
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "logit_scale": 8.0 if not model.size.is_tiny else 0.5,
    }


def gemma2(model: Model) -> None:
    model.metadata |= {
        "rope.freq_base": 1e4,
        "attention.sliding_window": WINDOW if model.size.is_tiny else 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    sandwiched(model)


def gemma3(model: Model) -> None:
    model.metadata["attention.sliding_window"] = WINDOW if model.size.is_tiny else 512
    sandwiched(model, qk_norm="head")


def sandwiched(model: Model, *, qk_norm: str = "") -> None:
    """Norms before and behind attention and feed-forward."""
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block, qk_norm=qk_norm)
        model.norm(f"{block}.post_attention_norm")
        model.norm(f"{block}.ffn_norm")
        model.feed_forward(block)
        model.norm(f"{block}.post_ffw_norm")
    model.end()


def phi3(model: Model) -> None:
    """Queries, keys and values in one matrix, gate and up in another; rope on a part of a head, in two scales."""
    size = model.size
    rotated = size.head_dim * 3 // 4 // 2 * 2
    model.metadata |= {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e4,
        "rope.dimension_count": rotated,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.attn_factor": 1.19,
    }
    half = rotated // 2
    model.add("rope_factors_long.weight", half, kind="values", values=[1 + i for i in range(half)])
    model.add("rope_factors_short.weight", half, kind="values", values=[1 + 0.1 * i for i in range(half)])
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.linear(f"{block}.attn_qkv", (size.n_head + 2 * size.n_kv) * size.head_dim, size.n_embd)
        model.linear(f"{block}.attn_output", size.n_embd, size.n_head * size.head_dim)
        model.norm(f"{block}.ffn_norm")
        _fused_feed_forward(model, block)
    model.end()


def _fused_feed_forward(model: Model, block: str) -> None:
    model.linear(f"{block}.ffn_up", 2 * model.size.n_ff, model.size.n_embd)
    model.linear(f"{block}.ffn_down", model.size.n_embd, model.size.n_ff)


def behind(model: Model, *, qk_norm: str) -> None:
    """Norms behind attention and feed-forward alone."""
    for block in model.blocks:
        model.attention(block, qk_norm=qk_norm)
        model.norm(f"{block}.post_attention_norm")
        model.feed_forward(block)
        model.norm(f"{block}.post_ffw_norm")
    model.end()


def starcoder2(model: Model) -> None:
    model.metadata["attention.layer_norm_epsilon"] = 1e-5
    for block in model.blocks:
        model.norm(f"{block}.attn_norm", bias=True)
        model.attention(block, bias=True, out_bias=True)
        model.norm(f"{block}.ffn_norm", bias=True)
        model.feed_forward(block, gated=False, bias=True)
    model.end(bias=True)


def glm4(model: Model) -> None:
    """Norms before and behind; rope on half a head, on neighbours; gate and up in one matrix."""
    model.metadata |= {"rope.dimension_count": model.size.head_dim // 2, "attention.layer_norm_rms_epsilon": 1e-5}
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block, bias=True)
        model.norm(f"{block}.post_attention_norm")
        model.norm(f"{block}.ffn_norm")
        _fused_feed_forward(model, block)
        model.norm(f"{block}.post_ffw_norm")
    model.end()


def cohere2(model: Model) -> None:
    """Attention and feed-forward side by side behind one norm; every fourth block sees everything, without rope."""
    model.metadata |= {
        "attention.layer_norm_epsilon": 1e-5,
        "attention.sliding_window": WINDOW if model.size.is_tiny else 4096,
        "logit_scale": 0.25,
    }
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block)
        model.feed_forward(block)
    model.end()


def arcee(model: Model) -> None:
    """A squared ReLU in place of a gate."""
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block)
        model.norm(f"{block}.ffn_norm")
        model.feed_forward(block, gated=False)
    model.end()


def seed_oss(model: Model) -> None:
    """The norm before the feed-forward part goes by another name."""
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block, bias=True)
        model.norm(f"{block}.post_attention_norm")
        model.feed_forward(block)
    model.end()


def with_bias(model: Model) -> None:
    plain(model, bias=True)


def with_qk_norm(model: Model) -> None:
    plain(model, qk_norm="head")


def exaone4(model: Model) -> None:
    behind(model, qk_norm="head")


def olmo2(model: Model) -> None:
    behind(model, qk_norm="whole")
