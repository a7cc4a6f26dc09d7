"""Keeps what torch and transformers import, and never use here, out of the process: 120 MB and 2 s of compiler.

transformers imports torch._dynamo for one context manager and a few decorators, and torch.distributed's tensors and
flex attention because they are there. Engine and trainer compile nothing and are alone, so they get an empty shell of
torch._dynamo, whose modules can still be imported one by one, and are told that the rest is not available.
"""

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL_IMPORTS = "AGENTD_FULL_IMPORTS"
"""Set in the environment, it turns all of this off."""

_NOT_NEEDED = (
    "is_torch_flex_attn_available",
    "is_torch_distributed_available",
    "is_accelerate_available",
    "is_scipy_available",
    "is_sklearn_available",
)


def import_lean(module: str, *, meta_device: bool) -> None:
    """Imports transformers without what is not needed. Where a version of it or of torch cannot do without,
    `python -m module`, with the arguments that this process has, takes this process's place and imports all.

    `meta_device`: whether this process computes with tensors that have no data, of which torch need be told how.
    """
    try:
        slim(meta_device=meta_device)
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401
    except Exception as error:
        if os.environ.get(FULL_IMPORTS):
            raise
        print(f"lean imports failed ({type(error).__name__}: {error}); starting again with full ones", file=sys.stderr)
        os.environ[FULL_IMPORTS] = "1"
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def slim(*, meta_device: bool) -> bool:
    """Call before anything imports transformers, in a process that will never compile. False if it was turned off.

    Raises what a version of torch raises that cannot do without.
    """
    if os.environ.get(FULL_IMPORTS) or "torch._dynamo" in sys.modules:
        return False
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not meta_device:
        forgo_meta_device()
    import torch

    shell = types.ModuleType("torch._dynamo")
    shell.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]

    def attribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "config":  # settings, which torch.utils.checkpoint looks into
            return importlib.import_module("torch._dynamo.config")
        return _unavailable if name.startswith("is_") else _undecorated

    vars(shell)["__getattr__"] = attribute
    sys.modules["torch._dynamo"] = shell
    # The decorator and the check that torch.compiler forwards to the compiler itself.
    torch.compiler.disable = _undecorated

    import transformers.utils
    import transformers.utils.import_utils

    for module in (transformers.utils, transformers.utils.import_utils):
        for name in _NOT_NEEDED:
            if hasattr(module, name):
                setattr(module, name, _unavailable)
    return True


def forgo_meta_device() -> None:
    """Imports torch, if it is not there, without how to compute with tensors that have no data: 18 MB and 0.3 s."""
    if "torch" not in sys.modules:
        sys.modules["torch._meta_registrations"] = types.ModuleType("torch._meta_registrations")
    import torch
    import torch._prims.rng_prims  # the one part of it that random numbers need

    torch.Generator()  # raises if they need more than that


def _undecorated(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return fn if fn is not None else lambda wrapped: wrapped


def _unavailable(*_: Any, **__: Any) -> bool:
    return False
