"""An input as it is sent and stored, as a tensor: an array in base64, or a PNG image.

{"array": {"dtype": "uint8", "shape": [1, 28, 28], "data": base64, little-endian, the last dimension contiguous}}
{"png": base64}
"""

import base64
import binascii
import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from agentd.errors import InvalidRequest

_DTYPES = {
    "uint8": "|u1",
    "int8": "|i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
}
_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode


def values(input: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    """The input's values, float64 of `shape`. Raises InvalidRequest saying what does not fit."""
    if input.keys() == {"array"}:
        return _array(input["array"], shape)
    if input.keys() == {"png"}:
        return _png(_bytes(input["png"]), shape)
    raise InvalidRequest("a classifier takes an array or a PNG image", param="input")


def _array(array: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    if tuple(array["shape"]) != shape:
        raise InvalidRequest(f"the array has shape {array['shape']}, and the model takes {list(shape)}", param="shape")
    if array["dtype"] not in _DTYPES:
        raise InvalidRequest(f"dtype is one of {', '.join(_DTYPES)}, not {array['dtype']!r}", param="dtype")
    data, dtype = _bytes(array["data"]), np.dtype(_DTYPES[array["dtype"]])
    if len(data) != math.prod(shape) * dtype.itemsize:
        size = math.prod(shape) * dtype.itemsize
        raise InvalidRequest(
            f"the array has {len(data)} bytes, and {size} are needed for shape {list(shape)} of {array['dtype']}",
            param="input",
        )
    values = torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).astype(np.float64))
    if not bool(torch.isfinite(values).all()):
        raise InvalidRequest("the array has entries that are NaN or infinite", param="input")
    return values


def _png(data: bytes, shape: tuple[int, ...]) -> Tensor:
    if len(shape) != 3 or shape[0] not in _MODES:
        raise InvalidRequest(f"the model takes arrays of shape {list(shape)}, no images", param="input")
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # Before anything is unpacked: a small file may hold a huge image.
            if image.size != (width, height):
                raise InvalidRequest(
                    f"the image is {image.width} x {image.height} pixels, and the model takes {width} x {height}",
                    param="input",
                )
            if image.mode.startswith(("I", "F")):
                raise InvalidRequest("the image has more than 8 bits a channel; send it as an array", param="input")
            pixels = np.asarray(image.convert(_MODES[channels]))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"the body is no PNG image that can be read ({error})", param="input") from None
    planes = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(planes.astype(np.float64))


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("the data is not base64", param="input") from None
