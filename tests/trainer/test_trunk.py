"""The trunk as the trainer runs it: what transformers' own model has at the input of the first trained block."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from agentd.adapt import dataset as datasets
from agentd.errors import TrainerFailed
from agentd.trainer import trunk
from agentd.trainer.lora import write_adapter
from agentd.trainer.spec import InvalidSpec, parse_spec

FIRST = 5


def rows_of(reviews: Any) -> list[int]:
    """The token of every row: the shared prefix, then what each sequence has besides."""
    n = len(reviews.prefix)
    return [*reviews.prefix, *(token for sequence in reviews.tokens for token in sequence[n:])]


def expected(reference: Any, reviews: Any, block: int) -> torch.Tensor:
    rows = []
    with torch.no_grad():
        for i, tokens in enumerate(reviews.tokens):
            hidden = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[block][0]
            rows.append(hidden if i == 0 else hidden[len(reviews.prefix) :])
    return torch.cat(rows)


def computed(spec: dict[str, Any]) -> torch.Tensor:
    seen: list[tuple[int, int]] = []
    parsed = parse_spec(spec)
    trunk.run(parsed, lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, parsed.first_block) for i in range(parsed.first_block)]
    return torch.from_numpy(np.fromfile(parsed.tap, np.float32)).view(-1, parsed.n_embd)


@pytest.fixture
def spec(make_spec: Any, reviews: Any, tmp_path: Path) -> dict[str, Any]:
    made: dict[str, Any] = make_spec(30 - FIRST, tmp_path / "tap.f32", tokens=rows_of(reviews))
    return made


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_what_transformers_has(spec: dict[str, Any], reference: Any, reviews: Any) -> None:
    theirs = expected(reference, reviews, FIRST)
    assert apart(computed(spec), theirs) < 1e-4
    narrow = computed({**spec, "train": {**spec["train"], "bf16": True}})
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
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gemma3_path.parent, gguf_file=gemma3_path.name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 260, (3, 26), generator=generator)
    tokens[:, :12] = tokens[0, :12]
    with torch.no_grad():
        hidden = model.eval()(tokens, output_hidden_states=True).hidden_states[4]
    places = [{"offset": 12 + 14 * i, "n": 14} for i in range(3)]
    term = [0, 25, 7]
    examples = [
        {"id": str(i), "sequences": [place], "choices": [], "correct": 0, "target": [term]}
        for i, place in enumerate(places)
    ]
    found = computed(
        {
            "model": str(gemma3_path),
            "first_block": 4,
            "end_block": 6,
            "tap": {"path": str(tmp_path / "tap"), "n_embd": 64},
            "prefix": {"offset": 0, "n": 12},
            "examples": examples,
            "tokens": [*tokens[0, :12].tolist(), *tokens[:, 12:].flatten().tolist()],
            "output": str(tmp_path / "adapter.gguf"),
        }
    )
    assert apart(found, torch.cat([hidden[0, :12], hidden[:, 12:].flatten(0, 1)])) < 1e-4


def test_training_goes_on_from_it(spec: dict[str, Any], run_trainer: Any, tmp_path: Path) -> None:
    """The real process: it fills the tap, then learns from it."""
    run = run_trainer({**spec, "train": {**spec["train"], "max_epochs": 2, "bf16": True}})
    assert run.status == 0, run.log
    kinds = [event["event"] for event in run.events]
    assert kinds.index("ready") > kinds.index("trunk")
    assert run.kind("trunk")[-1] == {"event": "trunk", "blocks": FIRST, "of": FIRST}
    (done,) = run.kind("done")
    assert done["dev_loss_after"] < done["dev_loss_before"]


def test_places_are_those_that_the_engine_would_give() -> None:
    """What all sequences begin with is there once, and never a row that is scored."""
    encoded: dict[int, dict[str, Any]] = {
        0: {
            "sequences": [[1, 2, 3, 4], [1, 2, 3, 9]],
            "choices": [[[0, 3, 5]], [[1, 3, 6]]],
            "correct": 0,
            "target": [[0, 3, 5]],
        },
        1: {"sequences": [[1, 2, 3, 7, 8]], "choices": [], "correct": 0, "target": [[0, 4, 5]]},
    }
    members: Any = [type("Member", (), {"number": number}) for number in encoded]
    assert datasets.layout(members, encoded) == {
        "prefix_rows": 3,
        "sequences": [[[3, 1], [4, 1]], [[5, 2]]],
        "tokens": [1, 2, 3, 4, 9, 7, 8],
    }
    encoded[1]["target"] = [[0, 1, 3], [0, 2, 7]]
    assert datasets.layout(members, encoded)["prefix_rows"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "must be a list of whole numbers"),
        ({"tokens": [1, -2]}, "must be a list of whole numbers"),
        ({"tokens": [1, 2, 3]}, "tokens has 3, and the prefix and the sequences go up to row"),
        ({"first_block": 0}, "there is no trunk"),
        ({"from_engine": True}, "where the engine computes"),
    ],
)
def test_specifications_that_make_no_sense(spec: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse_spec({**spec, **change})


def test_a_token_beyond_the_vocabulary(spec: dict[str, Any]) -> None:
    spec["tokens"][3] = 10**6
    with pytest.raises(TrainerFailed, match="beyond the vocabulary"):
        computed(spec)


def test_a_full_disk_is_named(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["tap"] = {**spec["tap"], "path": "/dev/full"}
    with pytest.raises(TrainerFailed, match="No space left"):
        computed(spec)
