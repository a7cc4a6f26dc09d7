"""tools/bench/paper/int8.py runs whole on small files of the real format, and goes on where it stopped."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tools.bench.paper import int8, int8_data
from tools.bench.paper.int8_data import from_folder, load, rotated
from tools.bench.paper.int8_recipes import METHODS


def write_idx(path: Path, array: np.ndarray) -> None:
    data = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, n, ending in (("train", 400, ".gz"), ("t10k", 120, "")):
        labels = generator.integers(0, 10, n).astype(np.uint8)
        images = generator.integers(0, 60, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 6, 6:20] += 190
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{ending}", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{ending}", labels)
    return tmp_path


@pytest.mark.slow
def test_a_quick_run_reports_everything(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "160")
    output = folder / "results.json"
    arguments = ["--quick", "--data", str(folder), "--output", str(output), "--threads", str(min(2, threads))]
    try:
        int8.main([*arguments, "--parts", "scratch", "--budget", "0"])
        assert "call again" in capsys.readouterr().out
        int8.main(arguments)
        first = json.loads(output.read_text())
        int8.main(arguments)  # nothing is left to do
        assert json.loads(output.read_text()) == first
    finally:
        torch.set_num_threads(threads)
    runs = first["runs"]
    assert len(runs) == 2 * 8 + 2 * 8
    assert runs["scratch/BP/int8/0"]["accuracy"] > 50
    assert all(run["replayed"] for name, run in runs.items() if "ZO/int8" in name)
    assert runs["memory/lenet5/32/ZO"]["model_int8"] == 1_716_554
    printed = capsys.readouterr().out
    for word in ("sign agreement", "ElasticZO, last 2", "pointnet", "milliseconds"):
        assert word in printed
    with pytest.raises(SystemExit, match="other settings"):
        int8.main([*arguments, "--seeds", "2"])


def test_broken_data_says_what_is_wrong(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09abc")
    with pytest.raises(SystemExit, match="cut short"):
        load(folder)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"labels")
    with pytest.raises(SystemExit, match="no idx file"):
        load(folder)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SystemExit, match="has no t10k-labels-idx1-ubyte"):
        load(folder)


def test_rotation_turns_about_the_middle(folder: Path) -> None:
    images = from_folder(folder).test[0]
    assert torch.equal(rotated(images, 0), images)
    assert torch.equal(rotated(images, 90), torch.rot90(images, -1, (2, 3))) or torch.equal(
        rotated(images, 90), torch.rot90(images, 1, (2, 3))
    )
    assert int(rotated(images + 1, 45)[:, :, 0, 0].max()) == 0  # black corners


@pytest.mark.slow
def test_the_plot_is_a_png(tmp_path: Path) -> None:
    outcome = {"before": 10.0, "accuracy": 60.0, "seconds": 1.0}
    kinds = [f"{task}/{m}/{p}" for task in ("scratch", "rotated 45") for m in METHODS for p in ("fp32", "int8")]
    runs = {f"{kind}/{seed}": outcome for kind in kinds for seed in (0, 1)}
    int8.plot({"runs": runs}, tmp_path / "accuracies.png")
    with Image.open(tmp_path / "accuracies.png") as image:
        assert image.format == "PNG"
        assert image.width > 600
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20  # not an empty sheet


def test_recipes_are_tuned_on_training_images(folder: Path) -> None:
    images = from_folder(folder)
    held = images.validation()
    x, y = images.train
    assert torch.equal(torch.cat((held.train[0], held.test[0])), x)
    assert torch.equal(torch.cat((held.train[1], held.test[1])), y)
    assert len(held.test[1]) == len(y) // 6


@pytest.mark.slow
def test_digits_stand_in_where_there_is_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_data, "FOLDERS", ())
    images = load(None)
    assert images.name == "digits"
    x = torch.cat((images.train[0], images.test[0]))
    assert x.shape == (1797, 1, 28, 28)
    assert x.dtype == torch.uint8
    assert set(images.test[1].tolist()) == set(range(10))
    # Nearest neighbours in the training part know most of the rest: the labels belong to the images.
    near = torch.cdist(images.test[0].flatten(1).float(), images.train[0].flatten(1).float()).argmin(1)
    assert (images.train[1][near] == images.test[1]).float().mean() > 0.9
