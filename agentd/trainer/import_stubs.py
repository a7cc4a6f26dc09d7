"""Keeps what transformers imports, and never uses here, out of the process: 100 MB and 1.5 s of compiler.

transformers imports torch._dynamo for one context manager and a few decorators, and torch.distributed's tensors and
flex attention because they are there. This process compiles nothing and is alone, so it gets an empty shell of
torch._dynamo, whose modules can still be imported one by one, and is told that the rest is not available. Neither does
it compute with tensors that have no data, so torch need not tell its meta device how.
"""

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


def slim() -> bool:
    """Call before anything imports transformers, in a process that will never compile. False if it was turned off.

    Raises what a version of torch raises that cannot do without.
    """
    if os.environ.get(FULL_IMPORTS) or "torch._dynamo" in sys.modules:
        return False
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "torch" not in sys.modules:
        sys.modules["torch._meta_registrations"] = types.ModuleType("torch._meta_registrations")
    import torch
    import torch._prims.rng_prims  # the one part of it that random numbers need

    torch.Generator()  # raises if they need more than that

    shell = types.ModuleType("torch._dynamo")
    shell.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]

    def attribute(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _undecorated

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


def _undecorated(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return fn if fn is not None else lambda wrapped: wrapped


def _unavailable(*_: Any, **__: Any) -> bool:
    return False
