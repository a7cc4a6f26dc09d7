"""What the planner knows of a directory of transformers, under any names of its sizes."""

from pathlib import Path
from typing import Any

import pytest

from agentd.budget.model_shapes import ModelShapes
from agentd.formats.checkpoint_header import CheckpointHeader
from agentd.formats.gguf_header import read_header
from tools import shape_model

SHAPES = {"embed.weight": (99, 32), "final.weight": (32,)} | {
    f"body.{i}.{name}.weight": shape
    for i in range(3)
    for name, shape in (("attention", (32, 32)), ("up", (128, 32)), ("down", (32, 128)), ("norm", (32,)))
}


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4},
        {"n_layer": 3, "n_embd": 32, "n_head": 4},
        {"n_layers": 3, "d_model": 32, "n_heads": 4},
        {"text_config": {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4}},
        {"depth": 3, "d_model": 32, "n_heads": 4},  # the tensors' names tell
    ],
)
def test_sizes_are_found_under_any_name(config: dict[str, Any]) -> None:
    header = CheckpointHeader({"model_type": "any", "vocab_size": 99, **config}, SHAPES, (), 0)
    shapes = ModelShapes.from_checkpoint(header)
    assert (shapes.n_layer, shapes.n_embd, shapes.n_head, shapes.head_dim) == (3, 32, 4, 8)
    assert shapes.block_parameters == (32 * 32 + 2 * 32 * 128 + 32,) * 3
    assert shapes.lora_width == (64 + 160 + 160,) * 3
    assert shapes.tied
    assert shapes.embedding_bytes == 4 * 99 * 32


@pytest.mark.parametrize(
    ("name", "attention", "state"),
    [
        ("qwen3", None, 0),
        ("qwen3.5", 2, 4 * 6 * (32 * 64 + 3 * (64 + 2 * 2 * 32))),  # six gated delta nets of eight blocks
        ("granite4", 1, 4 * 3 * (16 * 128 + 3 * (128 + 2 * 16))),
        ("lfm2", 1, 4 * 4 * 2 * 64),
    ],
)
def test_recurrent_blocks_keep_a_state_in_place_of_keys_and_values(
    name: str, attention: int | None, state: int, tmp_path: Path
) -> None:
    shapes = ModelShapes.from_header(read_header(shape_model.write(tmp_path / "model.gguf", name)))
    assert (shapes.attention_blocks, shapes.state_bytes) == (attention, state)
    blocks = shapes.n_layer if attention is None else attention
    assert shapes.kv_bytes_per_token == 2 * 2 * blocks * shapes.n_head_kv * shapes.head_dim
