"""What the planner knows of a directory of transformers, under any names of its sizes."""

from typing import Any

import pytest

from agentd.budget.model_shapes import ModelShapes
from agentd.formats.checkpoint_header import CheckpointHeader

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
