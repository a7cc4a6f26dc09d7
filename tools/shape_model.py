"""A model of a real family's shape with random weights, in GGUF: `python -m tools.shape_model qwen3 --size 0.6B`.

At its real size for memory and time, which depend on shapes alone; tiny (the default) for tests. The weights are scaled
so that every block changes its input and no value grows; norms and biases differ from 1 and 0, so that one that is
left out, or put elsewhere, shows.
"""

import argparse
import sys
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tools import tiny_model
from tools.shapes.families import FAMILIES
from tools.shapes.model import TINY, Model, TensorShape

_POOL = 1 << 22  # random values of a large matrix are drawn once and shifted: drawing them takes longer than writing
_SILENCE: list[Any] = []  # the callback: ctypes keeps no reference to what C calls


def write(path: Path, name: str, size: str = TINY, quantise: str = "F32", seed: int = 0) -> Path:
    """Writes the model to `path` and returns it. The same arguments give the same file.

    quantise  a type as llama.cpp's quantiser names it, or F32 or F16
    Raises KeyError for a family or size that is not known, ValueError for such a type or where quantising fails.
    """
    family = FAMILIES[name]
    shape = family.sizes[size]
    model = Model(family.architecture, shape, shape.vocabulary or len(tiny_model.tokens()))
    family.build(model)
    plain = quantise in ("F32", "F16")
    source = path if plain else path.with_suffix(".f16.gguf")
    _write(source, model, f"{name}-{size}", seed, half=quantise == "F16" or not (plain or shape.is_tiny))
    if not plain:
        try:
            _quantise(source, path, quantise)
        finally:
            source.unlink()
    return path


def _write(path: Path, model: Model, name: str, seed: int, *, half: bool) -> None:
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    for key, value in model.metadata.items():
        _add(writer, f"{model.architecture}.{key}", value)
    tiny_model.add_tokenizer(writer, size=model.vocabulary)
    types = [np.float16 if half and each.kind == "matrix" else np.float32 for each in model.tensors]
    for tensor, dtype in zip(model.tensors, types, strict=True):
        n = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(dtype), n)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, dtype in zip(model.tensors, types, strict=True):
        writer.write_tensor_data(_values(tensor, seed).astype(dtype))
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kind[type(value)](key, value)


def _values(tensor: TensorShape, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    if tensor.kind == "values":
        return np.array(tensor.values, np.float32)
    random = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    n = int(np.prod(tensor.shape))
    drawn = random.standard_normal(min(n, _POOL), np.float32)
    values: np.ndarray[Any, np.dtype[np.float32]]
    values = np.resize(drawn, tensor.shape) if n > _POOL else drawn.reshape(tensor.shape)
    if tensor.kind == "norm":
        values = 1 + 0.2 * values
    elif tensor.kind == "bias":
        values = 0.2 * values
    elif tensor.kind == "decay":
        values = -np.exp(0.5 * values)
    else:
        values /= np.float32(tensor.shape[-1] ** 0.5)
    return values


def _quantise(source: Path, target: Path, kind: str) -> None:
    import llama_cpp as lc

    name = f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"
    if not hasattr(lc, name):
        raise ValueError(f"llama.cpp quantises to no type {kind!r}")
    if not _SILENCE:
        _SILENCE.append(lc.llama_log_callback(lambda *_: None))
        lc.llama_log_set(_SILENCE[0], None)
    parameters = lc.llama_model_quantize_default_params()
    parameters.ftype = getattr(lc, name)
    if lc.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise ValueError(f"llama.cpp could not quantise the model to {kind}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="shape_model", description="Writes a model of a real shape, random weights.")
    parser.add_argument("name", choices=sorted(FAMILIES), help="the family")
    parser.add_argument("--size", default=TINY, help=f"one of the family's (default: {TINY})")
    parser.add_argument("--quantise", default="F32", metavar="TYPE", help="for instance Q4_K_M (default: F32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: NAME-SIZE-TYPE.gguf here")
    options = parser.parse_args(arguments)
    sizes = FAMILIES[options.name].sizes
    if options.size not in sizes:
        parser.error(f"{options.name} has the sizes {', '.join(sizes)}")
    output = options.output or Path(f"{options.name}-{options.size}-{options.quantise}.gguf")
    try:
        write(output, options.name, options.size, options.quantise, options.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{output}: {output.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
