"""Adapter files: what is written is what was trained, for a reader here and for llama.cpp."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentd.errors import TrainerFailed
from agentd.nn.blocks import Blocks
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.lora_blocks import attach, outside, read_adapter, read_control, write_adapter


def pair(seed: int, rank: int, n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, n_in, generator=generator) / n_in**0.5
    return a, torch.randn(n_out, rank, generator=generator)


def test_an_adapter_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pairs = {"blk.5.ffn_up.weight": pair(0, 3, 576, 1536), "blk.1.attn_v.weight": pair(1, 3, 576, 192)}
    write_adapter(tmp_path / "a.gguf", "llama", 12.0, pairs)
    adapter = read_adapter(tmp_path / "a.gguf")
    assert adapter.alpha == 12.0
    assert set(adapter.pairs) == set(pairs)
    for name, (a, b) in pairs.items():
        assert torch.equal(adapter.pairs[name][0], a)
        assert torch.equal(adapter.pairs[name][1], b)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, gemma3_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_adapter(path, "llama", 12.0, {"blk.5.ffn_up.weight": pair(0, 3, 576, 1536)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainerFailed, match="cut short"):
        read_adapter(path)
    with pytest.raises(TrainerFailed, match="No such file"):
        read_adapter(tmp_path / "none.gguf")
    with pytest.raises(TrainerFailed, match="not a LoRA adapter"):
        read_adapter(gemma3_path)
    with pytest.raises(TrainerFailed, match="not a control vector"):
        read_control(gemma3_path, 576)


def test_a_warm_start_continues_the_parents_function(tmp_path: Path, model_path: Path) -> None:
    """Under another alpha and a higher rank, B A alpha / rank stays what it was, and other blocks keep their bytes."""
    inside, elsewhere = pair(0, 4, 576, 1536), pair(1, 4, 576, 192)
    pairs = {"blk.5.ffn_up.weight": inside, "blk.3.attn_v.weight": elsewhere}
    write_adapter(tmp_path / "parent.gguf", "llama", 8.0, pairs)
    parent = read_adapter(tmp_path / "parent.gguf")
    update = inside[1] @ inside[0] * 8.0 / 4
    for rank, alpha in ((4, 8.0), (8, 16.0), (2, 8.0)):
        blocks = Blocks(GGUFFile(model_path), 5, 6)
        layers = attach(blocks, rank, alpha, 0, parent)
        layer = layers["blk.5.ffn_up.weight"]
        assert layer.a.shape[0] == max(rank, 4)
        assert torch.allclose(layer.b @ layer.a * layer.scale, update, rtol=1e-4, atol=1e-5)
        assert layers["blk.5.ffn_gate.weight"].b.abs().max() == 0
        factors = outside(parent, blocks, alpha)
        assert list(factors) == ["blk.3.attn_v.weight"]
        assert torch.allclose(factors["blk.3.attn_v.weight"][1] * alpha, elsewhere[1] * 8.0)
        if alpha == 8.0:
            assert torch.equal(factors["blk.3.attn_v.weight"][1], elsewhere[1])


def test_the_start_depends_on_the_seed_and_the_tensor_only(model_path: Path) -> None:
    file = GGUFFile(model_path)
    one, two = attach(Blocks(file, 5, 6), 8, 16.0, 5, None), attach(Blocks(file, 4, 6), 8, 16.0, 5, None)
    other = attach(Blocks(file, 5, 6), 8, 16.0, 6, None)
    name = "blk.5.ffn_up.weight"
    assert torch.equal(one[name].a, two[name].a)
    assert not torch.equal(one[name].a, other[name].a)
    assert one[name].a.std().item() == pytest.approx(576**-0.5, rel=0.1)


def test_a_parent_that_changes_what_cannot_be_trained_is_refused(tmp_path: Path, model_path: Path) -> None:
    """The rows of attn_q are permuted in a llama GGUF, so it has no LoRA here; dropping it would change the model."""
    write_adapter(tmp_path / "parent.gguf", "llama", 8.0, {"blk.5.attn_q.weight": pair(0, 4, 576, 576)})
    with pytest.raises(TrainerFailed, match=r"blk\.5\.attn_q\.weight"):
        attach(Blocks(GGUFFile(model_path), 5, 6), 4, 8.0, 0, read_adapter(tmp_path / "parent.gguf"))


def test_llama_cpp_does_with_the_adapter_what_torch_does(tmp_path: Path, model_path: Path, llama: Any) -> None:
    tokens = llama.tokens("<|im_start|>user\nIs this a good film? A wonderful, moving story.<|im_end|>\n<|im_start|>")
    plain = llama.logits(tokens)
    inputs = torch.from_numpy(llama.outputs["l_out-2"])[None]

    blocks = Blocks(GGUFFile(model_path), 3, 6)
    layers = attach(blocks, 8, 16.0, 0, None)
    head = GGUFFile(model_path).load("token_embd.weight")
    with torch.no_grad():
        before = (blocks.norm(blocks.run(inputs)[0]) @ head.T).numpy()
        for layer in layers.values():
            layer.b.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        after = (blocks.norm(blocks.run(inputs)[0]) @ head.T).numpy()
    write_adapter(tmp_path / "a.gguf", "llama", 16.0, {name: (layer.a, layer.b) for name, layer in layers.items()})
    with llama.adapted(tmp_path / "a.gguf"):
        adapted = llama.logits(tokens)

    noise = np.linalg.norm(plain - before) / np.linalg.norm(plain)  # 8-bit activations in llama.cpp
    assert noise < 0.05
    assert np.linalg.norm(adapted - after) / np.linalg.norm(adapted) < 0.05
    said, did = (after - before).ravel(), (adapted - plain).ravel()
    assert np.linalg.norm(did) > 3 * np.linalg.norm(plain - before)  # the adapter's change is not the noise
    assert said @ did / (np.linalg.norm(said) * np.linalg.norm(did)) > 0.95
    agree = (adapted.argmax(1) == after.argmax(1)).mean()
    assert agree > 0.8
    assert np.array_equal(llama.logits(tokens), plain)
