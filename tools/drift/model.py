"""The demo's classifier: LeNet-5 trained upright in fp32, then quantised by the command that users have."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from agentd.int8.architecture import LENET5
from agentd.int8.floating import FloatNetwork
from tools.bench.paper.int8_data import Images, as_float
from tools.elastic_float import ElasticFloat

FASHION = "T-shirt,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_BATCH = 128
_RATE = 0.1


def classes(images: Images) -> list[str]:
    """The names of the ten classes."""
    return FASHION.split(",") if images.name == "fashion-mnist" else [str(digit) for digit in range(10)]


def make(images: Images, folder: Path, steps: int, on_step: Callable[[int], None]) -> Path:
    """Trains by SGD for `steps` steps, writes float.safetensors and calibration.npy, and quantises them.

    Returns the classifier's file. Raises subprocess.CalledProcessError.
    """
    model = FloatNetwork.initialised(LENET5, 0)
    run = ElasticFloat(model, bp_layers=len(LENET5.trained_layers()))
    x, labels = images.train
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(0, len(labels), (_BATCH,), generator=order)
        run.step(as_float(x[chosen]), labels[chosen], step, lr_zo=0.0, lr_bp=_RATE * (1 - step / steps))
        on_step(step + 1)
    weights, calibration, out = folder / "float.safetensors", folder / "calibration.npy", folder / "lenet5.safetensors"
    save_file({p.name: value for p, value in zip(model.described, model.parameters, strict=True)}, weights)
    np.save(calibration, x[:256].numpy())
    command = [sys.executable, "-m", "agentd.engine.int8.quantise", str(weights), "--architecture", "lenet5"]
    command += ["--calibration", str(calibration), "--classes", ",".join(classes(images))]
    command += ["--mean", "127.5", "--scale", "127.5", "--output", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out
