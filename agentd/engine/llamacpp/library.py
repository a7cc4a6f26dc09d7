"""Loading llama.cpp: its log, the few ggml calls the binding leaves out, and the model itself."""

import ctypes
import logging
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp as lc

from agentd.errors import ModelUnusable

logger = logging.getLogger(__name__)
_recent: deque[str] = deque(maxlen=20)


# What llama.cpp says of a decode that was given up on purpose (GGML_STATUS_ABORTED is 1, llama_decode returns 2).
_GIVEN_UP = ("failed with error 1", "compute status: 1", "failed to decode, ret = 2")


@lc.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes
def _log(level: int, text: bytes, user_data: Any) -> None:
    line = text.decode("utf-8", "replace").strip()
    if line.endswith(_GIVEN_UP):
        return
    if line and level in (3, 4):  # ggml_log_level: 3 warn, 4 error, 5 goes on with the line before
        _recent.append(line)
    logger.log(logging.WARNING if level == 4 else logging.DEBUG, "llama.cpp: %s", line)


def last_words() -> str:
    """What llama.cpp last complained of, for error messages."""
    return "; ".join(line for line in list(_recent)[-3:]) or "llama.cpp gave no reason"


@cache
def ggml() -> ctypes.CDLL:
    """ggml's own library, for reading tensors in the evaluation callback."""
    library = ctypes.CDLL(str(Path(lc.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_get_name.restype, library.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    library.ggml_nelements.restype, library.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return library


def configured(parameters: Any, **values: Any) -> Any:
    """A ctypes structure with these fields set. Raises TypeError for one that it does not have: ctypes would take it
    without a word, as it took the setting for mmap when llama.cpp had renamed it."""
    names = {field[0] for field in parameters._fields_}
    if unknown := sorted(values.keys() - names):
        raise TypeError(f"{type(parameters).__name__} has no field {unknown[0]!r}")
    for name, value in values.items():
        setattr(parameters, name, value)
    return parameters


def load_model(path: Path, gpu_layers: int | str = "auto") -> Any:
    """Maps the weights; one copy serves every context. Raises ModelUnusable."""
    lc.llama_log_set(_log, None)
    lc.llama_backend_init()
    parameters = configured(lc.llama_model_default_params(), load_mode=lc.LLAMA_LOAD_MODE_MMAP)
    # Matrices for AMX would be copies in a layout of their own, and compiled by GCC 12 they end the process
    # (tools/setup.py, by which agentd's own llama.cpp has none).
    configured(parameters, use_extra_bufts=b"AMX_INT8 = 1" not in lc.llama_print_system_info())
    if gpu_layers != "auto":
        configured(parameters, n_gpu_layers=int(gpu_layers))
    _recent.clear()
    model = lc.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise ModelUnusable(path, last_words())
    if not lc.llama_model_has_decoder(model) or lc.llama_model_is_diffusion(model):
        lc.llama_model_free(model)
        raise ModelUnusable(path, "it is not a causal language model")
    return model


def metadata(model: Any, key: str) -> str | None:
    """A GGUF metadata value as text, or None."""
    size = 1 << 16
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = lc.llama_model_meta_val_str(model, key.encode(), buffer, size)
        if n < size:
            return buffer.value.decode("utf-8", "replace") if n >= 0 else None
        size = n + 1
