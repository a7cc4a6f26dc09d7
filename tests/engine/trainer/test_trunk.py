"""The trunk as the trainer runs it: what transformers' own model has at the input of the first trained block."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from agentd.errors import TrainerFailed
from agentd.formats.gguf_header import read_header
from agentd.learn.encoded import Encoded
from agentd.nn.lora_blocks import write_adapter
from agentd.trainer import trunk
from agentd.trainer.spec import parse_spec
from tests.engine.trainer.conftest import N_LAYER, distinct, gemma3, write_encoded

FIRST = 5


def expected(reference: Any, reviews: Any, block: int) -> torch.Tensor:
    def hidden(tokens: list[int]) -> torch.Tensor:
        states: torch.Tensor = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[block][0]
        return states

    with torch.no_grad():
        return distinct(len(reviews.prefix), reviews.encoded, hidden)


def computed(spec: dict[str, Any]) -> torch.Tensor:
    seen: list[tuple[int, int]] = []
    parsed = parse_spec(spec)
    trunk.run(parsed, lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, parsed.first_block) for i in range(parsed.first_block)]
    return torch.from_numpy(np.fromfile(parsed.tap, np.float32)).view(-1, read_header(parsed.model).embedding_length)


@pytest.fixture
def spec(make_spec: Any, reviews: Any, tmp_path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = make_spec(N_LAYER - FIRST, tmp_path / "tap.f32", states="computed")
    return tree


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_what_transformers_has(spec: dict[str, Any], reference: Any, reviews: Any) -> None:
    theirs = expected(reference, reviews, FIRST)
    assert apart(computed(spec), theirs) < 1e-4
    narrow = computed({**spec, "options": {**spec["options"], "bf16": True}})
    assert 1e-4 < apart(narrow, theirs) < 0.02
    assert torch.cosine_similarity(narrow, theirs).min() > 0.999


def test_the_parents_adapter_and_control_vector_are_in_it(
    spec: dict[str, Any], reference: Any, reviews: Any, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    down = reference.model.layers[2].mlp.down_proj
    a = torch.randn(4, down.in_features, generator=generator) / down.in_features**0.5
    b = 0.05 * torch.randn(down.out_features, 4, generator=generator)
    above = (torch.randn(4, 576, generator=generator), torch.randn(1536, 4, generator=generator))
    adapter, control = tmp_path / "parent.gguf", tmp_path / "control.gguf"
    pairs = {"blk.2.ffn_down.weight": (a, b), f"blk.{FIRST}.ffn_up.weight": above}  # the second is not in the trunk
    write_adapter(adapter, "llama", 8.0, pairs)
    vector = torch.randn(576, generator=generator)
    writer = gguf.GGUFWriter(control, "controlvector")
    writer.add_tensor("direction.3", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def adapted(_: Any, x: Any, y: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = 8.0 / 4 * (x[0] @ a.T) @ b.T
        return y + update

    hooks = [
        down.register_forward_hook(adapted),
        reference.model.layers[3].register_forward_hook(lambda _, __, out: out + vector),
    ]
    try:
        theirs = expected(reference, reviews, FIRST)
    finally:
        for hook in hooks:
            hook.remove()
    assert apart(computed({**spec, "initial": str(adapter), "control": str(control)}), theirs) < 1e-4
    assert apart(computed(spec), theirs) > 0.01


def test_scaled_embeddings_and_windows(gemma3_path: Path, tmp_path: Path) -> None:
    model = gemma3(gemma3_path)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 260, (3, 26), generator=generator)
    tokens[:, :12] = tokens[0, :12]
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[4]
    encoded = [Encoded.of([sequence], [], 0, [(0, 25, 7)]) for sequence in tokens.tolist()]
    states = computed(
        {
            "model": str(gemma3_path),
            "first_block": 4,
            "end_block": 6,
            "tap": str(tmp_path / "tap"),
            "encoded": str(write_encoded(tmp_path / "encoded.jsonl", encoded)),
            "states": "computed",
            "prefix": 12,
            "train": [0, 1, 2],
            "output": str(tmp_path / "adapter.gguf"),
        }
    )
    assert apart(states, torch.cat([hidden[0, :12], hidden[:, 12:].flatten(0, 1)])) < 1e-4


def test_training_goes_on_from_it(spec: dict[str, Any], run_trainer: Any, tmp_path: Path) -> None:
    """The real process: it fills the tap, then learns from it."""
    run = run_trainer({**spec, "options": {**spec["options"], "max_epochs": 2, "bf16": True}})
    assert run.status == 0, run.log
    kinds = [event["event"] for event in run.events]
    assert kinds.index("ready") > kinds.index("trunk")
    assert run.kind("trunk")[-1] == {"event": "trunk", "blocks": FIRST, "of": FIRST}
    (done,) = run.kind("done")
    assert done["dev_loss_after"] < done["dev_loss_before"]


def test_a_token_beyond_the_vocabulary(spec: dict[str, Any], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Path(spec["encoded"]).read_text().splitlines()]
    lines[3]["shared"][-2] = 10**6
    write_encoded(tmp_path / "encoded.jsonl", [Encoded(**line) for line in lines])
    spec["encoded"] = str(tmp_path / "encoded.jsonl")
    with pytest.raises(TrainerFailed, match="beyond the vocabulary"):
        computed(spec)


def test_a_full_disk_is_named(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["tap"] = "/dev/full"
    with pytest.raises(TrainerFailed, match="No space left"):
        computed(spec)
