"""tools/bench_int8.py runs whole on small files of the real format, and goes on where it stopped."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tools import bench_int8
from tools.bench_int8_data import from_folder, load, rotated


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


def test_a_quick_run_reports_everything(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "160")
    output = folder / "results.json"
    arguments = ["--quick", "--data", str(folder), "--output", str(output), "--threads", str(min(2, threads))]
    try:
        bench_int8.main([*arguments, "--parts", "scratch", "--budget", "0"])
        assert "call again" in capsys.readouterr().out
        bench_int8.main(arguments)
        first = json.loads(output.read_text())
        bench_int8.main(arguments)  # nothing is left to do
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
        bench_int8.main([*arguments, "--seeds", "2"])


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
