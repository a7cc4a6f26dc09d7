"""Makes an int8 classifier of float weights: post-training quantisation with calibration.

    python -m agentd.engine.int8.quantise float.safetensors --architecture lenet5 --calibration images.npy \\
        --classes T-shirt,Trouser,... --mean 127.5 --scale 127.5 --output classifier.safetensors

The weights are a safetensors file with the architecture's names or in its order; the architecture is a built-in name or
a YAML file (docs/int8.md). Inputs v are seen by the network as (v - mean) / scale. The calibration, a .npy array of
some hundred typical inputs (n, *input) as clients will send them, decides the input's exponent and which weights are
better clipped than rounded.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from agentd.int8.architecture import BUILT_IN, Architecture
from agentd.int8.header import FORMAT, ClassifierHeader, parse
from agentd.int8.weights import input_exponent, load_float, quantised, save_int8


def quantise(
    weights: Path,
    architecture: Architecture,
    calibration: Tensor,
    output: Path,
    *,
    classes: tuple[str, ...],
    mean: float,
    scale: float,
) -> ClassifierHeader:
    """Writes the classifier to `output`. Raises ValueError saying what does not fit, and OSError."""
    if tuple(calibration.shape[1:]) != architecture.input or not len(calibration):
        shape = ", ".join(map(str, architecture.input))
        raise ValueError(f"the calibration has shape {tuple(calibration.shape)}, and (n, {shape}) is needed")
    x = ((calibration.double() - mean) / scale).float()
    network = quantised(load_float(architecture, weights), x)
    header = ClassifierHeader(architecture, classes, input_exponent(x), mean, scale)
    # As the daemon will read it: mistakes in names and scaling show here, not at its start.
    parse({"format": FORMAT, "architecture": json.dumps(architecture.as_dict()), **header.metadata()})
    save_int8(network, output, header.metadata())
    return header


def described(name: str) -> Architecture:
    """A built-in architecture, or the one in a YAML file. Raises ValueError and OSError."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    tree = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"{name} describes no architecture; it should hold name, input and layers")
    return Architecture.parse(tree)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m agentd.engine.int8.quantise", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("weights", type=Path, help="float weights (safetensors)")
    parser.add_argument("--architecture", required=True, help=f"{', '.join(BUILT_IN)}, or a YAML file")
    parser.add_argument("--calibration", type=Path, required=True, help="typical inputs (.npy), as clients send them")
    parser.add_argument("--classes", help="the classes' names, comma-separated (default: 0, 1, ...)")
    parser.add_argument("--mean", type=float, default=0.0, help="taken from every value (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="then divides it (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the int8 classifier (safetensors)")
    options = parser.parse_args(arguments)
    try:
        architecture = described(options.architecture)
        names = options.classes.split(",") if options.classes else map(str, range(architecture.classes))
        quantise(
            options.weights,
            architecture,
            torch.from_numpy(np.load(options.calibration, allow_pickle=False).astype(np.float64)),
            options.output,
            classes=tuple(name.strip() for name in names),
            mean=options.mean,
            scale=options.scale,
        )
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"quantise: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    size = options.output.stat().st_size
    print(f"{options.output}: {architecture.name}, {architecture.size} parameters, {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
