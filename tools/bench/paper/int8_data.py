"""Images for tools/bench/paper/int8.py: Fashion-MNIST's files, scikit-learn's digits, and rotations of either.

Fashion-MNIST comes from Debian's package dataset-fashion-mnist, or from a folder with the same four files.
"""

import gzip
import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Images:
    """uint8 images of shape (n, 1, 28, 28) and int64 classes of shape (n,)."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def validation(self) -> "Images":
        """The training images alone, their last sixth in the test set's place: what recipes are tuned on."""
        x, y = self.train
        cut = len(x) - len(x) // 6
        return Images(f"{self.name}, validation", (x[:cut], y[:cut]), (x[cut:], y[cut:]))


def load(path: Path | None) -> Images:
    """The data in `path`, or Debian's, or the digits. Raises SystemExit saying what to do where there is none."""
    if path is not None:
        return from_folder(path)
    for folder in FOLDERS:
        if folder.is_dir():
            return from_folder(folder)
    return digits()


def from_folder(folder: Path) -> Images:
    """The four idx files in `folder`, gzipped or not. Raises SystemExit."""
    arrays = []
    for name in _FILES:
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise SystemExit(f"{folder} has no {name}[.gz]; it should hold the four files of Fashion-MNIST")
        arrays.append(read_idx(path))
    images, labels, test_images, test_labels = arrays
    if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise SystemExit(f"{folder}: the images are {images.shape} and the labels {labels.shape}")
    name = "fashion-mnist" if "fashion" in str(folder.resolve()) else folder.name
    return Images(name, _pair(images, labels), _pair(test_images, test_labels))


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an idx file. Raises SystemExit."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no idx file of unsigned bytes")
    header = 4 + 4 * data[3]
    shape = [int(side) for side in np.frombuffer(data[4:header], ">u4")]
    if len(data) != header + math.prod(shape):
        raise SystemExit(f"{path} is cut short: {len(data)} bytes, and {header + math.prod(shape)} are needed")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def digits() -> Images:
    """scikit-learn's 1,797 digits, enlarged to 28 x 28; a quarter of them held out. Raises SystemExit."""
    try:
        load_digits = importlib.import_module("sklearn.datasets").load_digits  # optional, so not for mypy to find
    except ImportError:
        raise SystemExit(
            "no data: install Debian's dataset-fashion-mnist, or name a folder with its files (--data), "
            "or install scikit-learn for its digits"
        ) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] * (255 / 16)
    images = functional.pad(functional.interpolate(images, scale_factor=3.0, mode="bilinear"), (2, 2, 2, 2))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images.round().to(torch.uint8)[order], torch.from_numpy(bunch.target).to(torch.int64)[order]
    cut = len(x) * 3 // 4
    return Images("digits", (x[:cut], y[:cut]), (x[cut:], y[cut:]))


def rotated(images: Tensor, degrees: float) -> Tensor:
    """uint8 images turned about their middle, black behind the corners."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    parts = []
    for start in range(0, len(images), 5000):
        part = images[start : start + 5000]
        theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(part), 2, 3)
        grid = functional.affine_grid(theta, list(part.shape), align_corners=False)
        parts.append(functional.grid_sample(part.to(torch.float32), grid, align_corners=False).round().to(torch.uint8))
    return torch.cat(parts)


def as_float(images: Tensor) -> Tensor:
    """uint8 images in [-1, 1]."""
    return (images.to(torch.float32) - 127.5) / 127.5


def _pair(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))
