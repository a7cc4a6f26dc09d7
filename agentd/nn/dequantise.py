"""Quantised weights to float32, by ggml's own routines where they are installed: every type there is, on any core.

gguf's routines in NumPy give the same values for most types, many times slower, and are used where ggml is missing.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class _Traits(ctypes.Structure):
    """The beginning of ggml_type_traits (ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def dequantise(raw: Bytes, kind: gguf.GGMLQuantizationType, out: Floats) -> None:
    """Fills `out` (rows, columns) from the rows' bytes, `raw` (rows, bytes of a row). Both must be contiguous.

    One core makes some 2.6e9 weights a second out of Q4_1, so nothing is gained by keeping what can be made again.
    """
    if kind == gguf.GGMLQuantizationType.F32:
        out[:] = raw.view(np.float32)
        return
    convert = _converter(kind)
    if convert is None:
        out[:] = gguf.quants.dequantize(raw, kind)
    else:
        convert(raw.ctypes.data, out.ctypes.data, out.size)


@cache
def _converter(kind: gguf.GGMLQuantizationType) -> Callable[[int, int, int], None] | None:
    """ggml's to_float of this type: (source, target, weights). None where ggml or the type is missing."""
    library = _ggml()
    if library is None:
        return None
    traits = library.ggml_get_type_traits(int(kind)).contents
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not traits.to_float or traits.blck_size != block or traits.type_size != size:
        return None
    convert: Callable[[int, int, int], None] = traits.to_float
    return convert


@cache
def _ggml() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("llama_cpp")  # found, not imported: the trainer needs no second engine
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in (Path(folder) / "lib").glob("libggml-base.*"):
            try:
                library = ctypes.CDLL(str(path))
                library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
                library.ggml_get_type_traits.argtypes = [ctypes.c_int]
            except (OSError, AttributeError):
                continue
            return library
    return None
