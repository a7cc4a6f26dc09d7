"""The files of tools/shape_model.py: real shapes, the same bytes from the same arguments."""

from pathlib import Path

import pytest

from agentd.budget.model_shapes import ModelShapes
from agentd.formats.gguf_header import read_header
from tools import shape_model
from tools.shapes.families import FAMILIES
from tools.shapes.model import TINY, Model


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_a_tiny_file(name: str, tmp_path: Path) -> None:
    header = read_header(shape_model.write(tmp_path / "tiny.gguf", name))
    size = FAMILIES[name].sizes[TINY]
    shapes = ModelShapes.from_header(header)
    assert header.architecture == FAMILIES[name].architecture
    assert (shapes.n_layer, shapes.n_embd, shapes.n_head, shapes.tied) == (size.blocks, 64, 4, size.tied)
    assert all(shapes.block_bytes)


def test_the_same_arguments_give_the_same_file(tmp_path: Path) -> None:
    one, same, other = (
        shape_model.write(tmp_path / f"{i}.gguf", "qwen3", seed=seed).read_bytes() for i, seed in enumerate((1, 1, 2))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [("qwen3", "0.6B", 596), ("qwen3", "1.7B", 1720), ("llama3.2", "1B", 1236), ("smollm2", "135M", 135)],
)
def test_full_sizes_have_the_parameters_that_their_names_say(name: str, size: str, millions: int) -> None:
    family = FAMILIES[name]
    model = Model(family.architecture, family.sizes[size], family.sizes[size].vocabulary)
    family.build(model)
    n = 0
    for tensor in model.tensors:
        product = 1
        for dimension in tensor.shape:
            product *= dimension
        n += product
    assert n / 1e6 == pytest.approx(millions, rel=0.01)


def test_what_is_not_known_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shape_model.main(["qwen3", "--size", "9B"])
    assert "tiny, 0.6B" in capsys.readouterr().err


def test_the_document_has_every_family() -> None:
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [[name, f"`{FAMILIES[name].architecture}`"] for name in sorted(FAMILIES)]
