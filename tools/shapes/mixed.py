"""Families with blocks of more than one kind, experts, or inputs besides the hidden states."""

from tools.shapes.dense import granite_scales
from tools.shapes.model import WINDOW, Model


def granite_moe(model: Model) -> None:
    granite_scales(model)
    more = model.size.more
    model.metadata |= {"expert_count": more["experts"], "expert_used_count": more["used"]}
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block)
        model.norm(f"{block}.ffn_norm")
        model.experts(block, more["experts"], model.size.n_ff)
    model.end()


def granite_hybrid(model: Model) -> None:
    """Mamba 2 in most blocks, attention without positions in some."""
    size, more = model.size, model.size.more
    attention = [i % more["period"] == more["offset"] for i in range(size.blocks)]
    inner, state, heads = 2 * size.n_embd, more["state"], more["ssm_heads"]
    granite_scales(model)
    model.metadata |= {
        "attention.head_count_kv": [size.n_kv * here for here in attention],
        "rope.scaling.finetuned": False,
        "ssm.conv_kernel": 4,
        "ssm.state_size": state,
        "ssm.group_count": 1,
        "ssm.inner_size": inner,
        "ssm.time_step_rank": heads,
    }
    for block, here in zip(model.blocks, attention, strict=True):
        model.norm(f"{block}.attn_norm")
        if here:
            model.attention(block)
        else:
            model.linear(f"{block}.ssm_in", 2 * inner + 2 * state + heads, size.n_embd)
            model.linear(f"{block}.ssm_conv1d", inner + 2 * state, 4, bias=True)
            model.add(f"{block}.ssm_dt.bias", heads, kind="bias")
            model.add(f"{block}.ssm_a", heads, 1, kind="decay")
            model.add(f"{block}.ssm_d", heads, 1, kind="norm")
            model.add(f"{block}.ssm_norm.weight", 1, inner, kind="norm")
            model.linear(f"{block}.ssm_out", size.n_embd, inner)
        model.norm(f"{block}.ffn_norm")
        model.feed_forward(block)
    model.end()


def qwen35(model: Model) -> None:
    """Gated delta nets, and every fourth block gated attention with rope on a quarter of a head."""
    size, more = model.size, model.size.more
    state, k_heads, v_heads = more["state"], more["k_heads"], more["v_heads"]
    value = state * v_heads
    mixed = 2 * state * k_heads + value
    rotated = size.head_dim // 4
    model.metadata |= {
        "rope.freq_base": 1e7,
        "rope.dimension_count": rotated,
        "rope.dimension_sections": [rotated // 2 - 2 * (rotated // 6), rotated // 6, rotated // 6, 0],
        "full_attention_interval": 4,
        "ssm.conv_kernel": 4,
        "ssm.state_size": state,
        "ssm.group_count": k_heads,
        "ssm.time_step_rank": v_heads,
        "ssm.inner_size": value,
    }
    for i, block in enumerate(model.blocks):
        model.norm(f"{block}.attn_norm")
        if i % 4 == 3:
            model.attention(block, qk_norm="head", gated=True)
        else:
            model.linear(f"{block}.attn_qkv", mixed, size.n_embd)
            model.linear(f"{block}.attn_gate", value, size.n_embd)
            model.linear(f"{block}.ssm_conv1d", mixed, 4)
            model.add(f"{block}.ssm_dt.bias", v_heads, kind="bias")
            model.add(f"{block}.ssm_a", v_heads, kind="decay")
            model.linear(f"{block}.ssm_beta", v_heads, size.n_embd)
            model.linear(f"{block}.ssm_alpha", v_heads, size.n_embd)
            model.norm(f"{block}.ssm_norm", state)
            model.linear(f"{block}.ssm_out", size.n_embd, value)
        model.norm(f"{block}.post_attention_norm")
        model.feed_forward(block)
    model.end()


def gemma3n(model: Model) -> None:
    """Four streams of states (AltUp), low-rank branches (LAuReL), an embedding of the token for every block."""
    size, streams, rank, per_block = model.size, 4, 64, 256
    model.metadata |= {
        "attention.sliding_window": WINDOW if size.is_tiny else 512,
        "attention.sliding_window_pattern": [i % 5 != 4 for i in range(size.blocks)],
        "attention.shared_kv_layers": 0,
        "altup.active_idx": 0,
        "altup.num_inputs": streams,
        "embedding_length_per_layer_input": per_block,
    }
    model.add("altup_proj.weight", streams - 1, size.n_embd, size.n_embd)
    model.add("altup_unembd_proj.weight", streams - 1, size.n_embd, size.n_embd)
    _per_block_embedding(model, per_block)
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block, qk_norm="head")
        model.norm(f"{block}.post_attention_norm")
        model.norm(f"{block}.ffn_norm")
        model.feed_forward(block)
        model.norm(f"{block}.post_ffw_norm")
        _per_block_input(model, block, per_block)
        model.linear(f"{block}.altup_correct_coef", streams, streams)
        model.norm(f"{block}.altup_correct_scale")
        model.linear(f"{block}.altup_predict_coef", streams * streams, streams)
        model.linear(f"{block}.altup_router", streams, size.n_embd)
        model.norm(f"{block}.altup_router_norm")
        model.linear(f"{block}.laurel_l", rank, size.n_embd)
        model.linear(f"{block}.laurel_r", size.n_embd, rank)
        model.norm(f"{block}.laurel_post_norm")
    model.end()


def _per_block_embedding(model: Model, width: int) -> None:
    blocks = model.size.blocks
    model.add("per_layer_token_embd.weight", model.vocabulary, width * blocks)
    model.add("per_layer_model_proj.weight", width * blocks, model.size.n_embd)
    model.norm("per_layer_proj_norm", width)


def _per_block_input(model: Model, block: str, width: int) -> None:
    model.linear(f"{block}.inp_gate", width, model.size.n_embd)
    model.linear(f"{block}.proj", model.size.n_embd, width)
    model.norm(f"{block}.post_norm")


def gemma4(model: Model) -> None:
    """Wider heads in blocks of global attention; the small ones have an embedding of the token for every block."""
    size, per_block = model.size, model.size.more["per_block"]
    is_local = [i % 6 != 5 for i in range(size.blocks)]
    wide = 2 * size.head_dim
    model.metadata |= {
        "attention.sliding_window": WINDOW if size.is_tiny else 512,
        "attention.sliding_window_pattern": is_local,
        "attention.shared_kv_layers": 0,
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": size.head_dim,
        "attention.value_length_swa": size.head_dim,
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": size.head_dim,
        "rope.freq_base_swa": 1e4,
        "embedding_length_per_layer_input": per_block,
        "final_logit_softcapping": 30.0,
    }
    rotated = wide // 8  # of the pairs of a head a quarter turns, the others stand
    model.add("rope_freqs.weight", wide // 2, kind="values", values=[1.0] * rotated + [1e30] * (wide // 2 - rotated))
    if per_block:
        _per_block_embedding(model, per_block)
    for block, local in zip(model.blocks, is_local, strict=True):
        model.norm(f"{block}.attn_norm")
        model.attention(block, qk_norm="head", head_dim=size.head_dim if local else wide)
        model.norm(f"{block}.post_attention_norm")
        model.add(f"{block}.layer_output_scale.weight", 1, kind="norm")
        model.norm(f"{block}.ffn_norm")
        model.feed_forward(block)
        model.norm(f"{block}.post_ffw_norm")
        if per_block:
            _per_block_input(model, block, per_block)
    model.end()


def lfm2(model: Model) -> None:
    _short_convolutions(model, dense=model.size.blocks)


def lfm2_moe(model: Model) -> None:
    more = model.size.more
    model.metadata |= {
        "expert_count": more["experts"],
        "expert_used_count": more["used"],
        "expert_feed_forward_length": more["width"],
        "expert_gating_func": 2,
        "leading_dense_block_count": 1,
    }
    _short_convolutions(model, dense=1)


def _short_convolutions(model: Model, dense: int) -> None:
    """Gated convolutions over three tokens, attention in every third block or so."""
    size, more = model.size, model.size.more
    attention = [i % 3 == 2 for i in range(size.blocks)]
    model.metadata |= {
        "attention.head_count_kv": [size.n_kv * here for here in attention],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "shortconv.l_cache": 3,
    }
    for i, block in enumerate(model.blocks):
        model.norm(f"{block}.attn_norm")
        if attention[i]:
            model.attention(block, qk_norm="head")
        else:
            model.linear(f"{block}.shortconv.conv", size.n_embd, 3)
            model.linear(f"{block}.shortconv.in_proj", 3 * size.n_embd, size.n_embd)
            model.linear(f"{block}.shortconv.out_proj", size.n_embd, size.n_embd)
        model.norm(f"{block}.ffn_norm")
        if i < dense:
            model.feed_forward(block)
        else:
            model.experts(block, more["experts"], more["width"], bias=True)
    model.end("token_embd_norm")


def qwen3_moe(model: Model) -> None:
    more = model.size.more
    model.metadata |= {
        "expert_count": more["experts"],
        "expert_used_count": more["used"],
        "expert_feed_forward_length": more["width"],
    }
    for block in model.blocks:
        model.norm(f"{block}.attn_norm")
        model.attention(block, qk_norm="head")
        model.norm(f"{block}.ffn_norm")
        model.experts(block, more["experts"], more["width"])
    model.end()
