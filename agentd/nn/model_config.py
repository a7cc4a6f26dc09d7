"""transformers' configuration of a model, from the metadata and tensors of its GGUF file.

A value is given by the name that the family's configuration has for it, so a family that transformers and llama.cpp
call alike needs no line here. Where a `config.json` of the same shape lies beside the file, it is used instead.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from agentd.formats.gguf_header import Header

Values = dict[str, Any]

_MODEL_TYPES = {
    "command-r": "cohere",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "granitehybrid": "granitemoehybrid",
    "hunyuan-dense": "hunyuan_v1_dense",
    "lfm2moe": "lfm2_moe",
    "mistral3": "ministral3",
    "qwen2moe": "qwen2_moe",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
}

# Metadata without the architecture's prefix -> names in transformers' configurations; all that a family has are set.
_KEYS: dict[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_eps"),
    "attention.scale": ("attention_multiplier",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_intermediate_size", "shared_expert_intermediate_size"),
    "expert_used_count": ("num_experts_per_tok",),
    "feed_forward_length": ("intermediate_size",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "leading_dense_block_count": ("num_dense_layers", "first_k_dense_replace"),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "residual_scale": ("residual_multiplier",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("linear_conv_kernel_dim", "mamba_d_conv"),
    "ssm.group_count": ("linear_num_key_heads", "mamba_n_groups"),
    "ssm.state_size": ("linear_key_head_dim", "mamba_d_state"),
    "ssm.time_step_rank": ("linear_num_value_heads", "mamba_n_heads"),
}

# Architectures for which llama.cpp has sliding windows; the others see everything, whatever their metadata say.
_WINDOWED = ("cohere2", "exaone4", "gemma2", "gemma3", "gemma3n", "gemma4", "llama4", "olmo2", "smallthinker")


class _Metadata:
    """A header's values without the architecture's prefix."""

    def __init__(self, header: Header) -> None:
        self._header, self.architecture, self.n = header, header.architecture, header.block_count
        self.tensors = {tensor.name for tensor in header.tensors}

    def __call__(self, key: str, default: Any = None) -> Any:
        return self._header.metadata.get(f"{self.architecture}.{key}", default)

    def largest(self, key: str) -> Any:
        """Where blocks differ, the largest value."""
        value = self(key)
        return max(value) if isinstance(value, tuple) and value else value

    def has(self, part: str) -> bool:
        """Whether any block has this tensor."""
        return any(name.endswith(f".{part}") for name in self.tensors)


def config_values(path: Path, header: Header, known: Mapping[str, Any]) -> Values:
    """The values of transformers' configuration, `model_type` among them. Raises ValueError, and KeyError for what
    the file does not say.

    known  transformers' configuration classes by model type
    """
    metadata = _Metadata(header)
    beside = _beside(path, metadata)
    if beside is not None and beside.get("model_type") in known:
        return beside
    name = metadata.architecture
    kind = _MODEL_TYPES.get(name, name.replace("-", "_"))
    if kind not in known:
        raise ValueError("transformers has no model of that name")
    default = known[kind]()
    values: Values = {"model_type": kind}
    for key, names in _KEYS.items():
        value = metadata.largest(key)
        if value is not None:
            values |= {ours: value for ours in names if hasattr(default, ours)}
    values["tie_word_embeddings"] = "output.weight" not in metadata.tensors
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    values["vocab_size"] = embedding.shape[-1] if embedding is not None else header.vocab_size
    for token in ("bos", "eos", "padding"):
        number = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        values["pad_token_id" if token == "padding" else f"{token}_token_id"] = number
    values["num_hidden_layers"] = header.block_count
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    head_dim = metadata("attention.key_length", values["hidden_size"] // values["num_attention_heads"])
    values["head_dim"] = head_dim
    values |= _biases(metadata, default)
    values["rope_parameters"] = _rope(metadata, default, head_dim)
    values |= _windows(metadata, default)
    if kind in _SPECIAL:
        values |= _SPECIAL[kind](metadata, values)
    return values


def _beside(path: Path, metadata: _Metadata) -> Values | None:
    """The `config.json` beside the file, if it is that of a model of this shape."""
    try:
        tree = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(tree, dict):
        return None
    tree = tree.get("text_config", tree)
    same = {"hidden_size": metadata("embedding_length"), "num_hidden_layers": metadata.n}
    return tree if isinstance(tree, dict) and all(tree.get(key) == value for key, value in same.items()) else None


def _biases(metadata: _Metadata, default: Any) -> Values:
    of_attention = metadata.has("attn_q.bias") or metadata.has("attn_qkv.bias")
    of_feed_forward = metadata.has("ffn_up.bias")
    wanted = {
        "attention_bias": of_attention,
        "mlp_bias": of_feed_forward,
        "use_bias": of_attention or of_feed_forward,
        "attention_out_bias": metadata.has("attn_output.bias"),
    }
    return {name: value for name, value in wanted.items() if hasattr(default, name)}


def _rope(metadata: _Metadata, default: Any, head_dim: int) -> Values:
    """Rope by kind of block where the family has several, else one for all. Factors by frequency, which some files have
    as a tensor, are applied to the finished model."""
    theirs = getattr(default, "rope_parameters", None) or {}
    scaling = _scaling(metadata)
    theta = metadata("rope.freq_base", 10000.0)
    if any(isinstance(value, Mapping) for value in theirs.values()):
        local = metadata("rope.freq_base_swa")
        return {
            kind: {**value, "rope_theta": theta, **scaling}
            if kind == "full_attention"
            else {**value, **({} if local is None else {"rope_theta": local})}
            for kind, value in theirs.items()
        }
    turned = metadata("rope.dimension_count", head_dim)
    partial = {"partial_rotary_factor": turned / head_dim} if turned != head_dim else {}
    return {"rope_type": "default", "rope_theta": theta, **partial, **scaling}


def _scaling(metadata: _Metadata) -> Values:
    kind, factor = metadata("rope.scaling.type"), metadata("rope.scaling.factor", 1.0)
    if kind == "linear" and factor != 1:
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        return {}
    values = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata(
            "rope.scaling.original_context_length", metadata("context_length")
        ),
        "beta_fast": metadata("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata("rope.scaling.yarn_beta_slow", 1.0),
    }
    if (log_multiplier := metadata("rope.scaling.yarn_log_multiplier")) is not None:
        values |= {"mscale": log_multiplier, "mscale_all_dim": log_multiplier}
    if (temperature := metadata("attention.temperature_scale")) is not None:
        values["llama_4_scaling_beta"] = temperature
    return values


def _windows(metadata: _Metadata, default: Any) -> Values:
    """What every block sees. A pattern that the file does not have is left to the family's own."""
    if not hasattr(default, "sliding_window"):
        return {}
    window = metadata("attention.sliding_window")
    windowed = metadata.architecture in _WINDOWED
    if metadata.architecture == "exaone4":
        windowed = metadata.n == 64  # so llama.cpp tells the 32B from the others
        window = window or 4096
    if metadata.architecture == "gemma2":
        window = window or 4096
    if not windowed or not window:
        everything = ["full_attention"] * metadata.n
        return {"sliding_window": None, **({"layer_types": everything} if hasattr(default, "layer_types") else {})}
    values: Values = {"sliding_window": window}
    if isinstance(pattern := metadata("attention.sliding_window_pattern"), tuple):
        values["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern[: metadata.n]]
    elif pattern:
        blocks = range(metadata.n)
        values["layer_types"] = ["sliding_attention" if i % pattern < pattern - 1 else "full_attention" for i in blocks]
    return values


def _by_heads(metadata: _Metadata, other: str) -> list[str]:
    """Kinds of blocks: attention where there are heads of keys and values, else `other`."""
    heads = metadata("attention.head_count_kv")
    heads = heads if isinstance(heads, tuple) else (heads,) * metadata.n
    return ["full_attention" if n else other for n in heads[: metadata.n]]


def _gemma(metadata: _Metadata, values: Values) -> Values:
    """The largest ones divide scores by another number than a head's width; llama.cpp knows them by their depth."""
    largest = values["num_hidden_layers"] in ((46,) if metadata.architecture == "gemma2" else (62,))
    width = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": width if largest else values["head_dim"]}


def _gemma4(metadata: _Metadata, values: Values) -> Values:
    heads = metadata("attention.head_count_kv")
    wide = heads[-1] if isinstance(heads, tuple) else heads
    local = max(heads) if isinstance(heads, tuple) else heads
    has_no_values = any(
        f"blk.{i}.attn_v.weight" not in metadata.tensors and f"blk.{i}.attn_k.weight" in metadata.tensors
        for i in range(values["num_hidden_layers"])
    )
    more = {"num_global_key_value_heads": wide} if has_no_values else {}
    return {
        "head_dim": metadata("attention.key_length_swa"),
        "global_head_dim": metadata("attention.key_length"),
        "num_key_value_heads": local,
        "attention_k_eq_v": has_no_values,
        "enable_moe_block": metadata.has("ffn_gate_inp.weight"),
        **more,
    }


def _lfm2(metadata: _Metadata, values: Values) -> Values:
    # the width in the file is the real one; by default transformers takes it for another from which it is computed
    return {"layer_types": _by_heads(metadata, "conv"), "block_auto_adjust_ff_dim": False}


def _lfm2_moe(metadata: _Metadata, values: Values) -> Values:
    return {"layer_types": _by_heads(metadata, "conv"), "use_expert_bias": metadata.has("exp_probs_b.bias")}


def _granite_hybrid(metadata: _Metadata, values: Values) -> Values:
    inner, heads = metadata("ssm.inner_size"), metadata("ssm.time_step_rank")
    experts = metadata("expert_count", 0)
    shared = metadata("expert_shared_feed_forward_length")
    return {
        "layer_types": _by_heads(metadata, "linear_attention"),
        "position_embedding_type": "rope" if metadata("rope.scaling.finetuned", True) else None,
        "mamba_expand": inner // values["hidden_size"],
        "mamba_d_head": inner // heads,
        "mamba_conv_bias": metadata.has("ssm_conv1d.bias"),
        "num_local_experts": experts,
        "shared_intermediate_size": shared if experts else values["intermediate_size"],
    }


def _qwen35(metadata: _Metadata, values: Values) -> Values:
    interval, n = metadata("full_attention_interval", 4), values["num_hidden_layers"]
    recurrent = metadata("attention.recurrent_layers") or [(i + 1) % interval for i in range(n)]
    return {
        "layer_types": ["linear_attention" if each else "full_attention" for each in recurrent[:n]],
        "linear_value_head_dim": metadata("ssm.inner_size") // metadata("ssm.time_step_rank"),
    }


def _normalised_experts(metadata: _Metadata, values: Values) -> Values:
    return {"norm_topk_prob": True}


_SPECIAL: dict[str, Callable[[_Metadata, Values], Values]] = {
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "gemma4_text": _gemma4,
    "granitemoehybrid": _granite_hybrid,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "qwen3_5_text": _qwen35,
    "qwen3_5_moe_text": _qwen35,
    "qwen3_next": _qwen35,
    "qwen3_moe": _normalised_experts,
}


def per_block_inputs(tensors: Iterable[str]) -> bool:
    """Whether blocks take more than hidden states: an embedding of the token for each of them."""
    return "per_layer_token_embd.weight" in tensors
