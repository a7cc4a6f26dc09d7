"""transformers' own model of a GGUF file without its weights: the frame that blocks are put into, and their names."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import Any

import gguf
import torch
from torch import nn

from agentd.errors import TrainerFailed
from agentd.trainer.gguf_file import GGUFFile


class Unsupported(TrainerFailed):
    """This model cannot be built here; it can still be trained with forward passes alone (k = 0)."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"backpropagation is not available for {path}: {reason}")
        self.reason = reason


def read_config(file: GGUFFile) -> tuple[Any, dict[str, Any]]:
    """transformers' configuration of the model, and the raw values it was made of. Raises Unsupported."""
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with _replaced(gguf, "GGUFReader", lambda _: file.reader()):
            values = loader.load_gguf_checkpoint(str(file.path), return_tensors=False)["config"]
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unsupported(file.path, f"architecture {file.header.architecture!r}: {error}") from error
    return config, values


def tensor_names(file: GGUFFile, model: Any, values: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """transformers' processor of this architecture's tensors, and its name for every GGUF tensor."""
    from transformers import modeling_gguf_pytorch_utils as loader

    processor = loader.TENSOR_PROCESSORS.get(file.header.architecture, loader.TensorProcessor)(config=values)
    try:
        # The loader asks gguf for the same table of names once per module: seconds, where one look is enough.
        with _replaced(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)):
            names: dict[str, str] = loader.get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise Unsupported(file.path, str(error)) from error
    return processor, names


class PassedOn(nn.Module):
    """Stands in for a block outside the range: its output is its input.

    It keeps the block's plain attributes (models ask blocks for their attention type) and its place in a KV cache,
    whose first layers tell models how far they are.
    """

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        for key, value in vars(block).items():
            if not key.startswith("_") and key != "training" and not isinstance(value, torch.Tensor):
                self.__dict__.setdefault(key, value)
        self.index = index
        self.as_tuple = False

    def forward(self, hidden_states: torch.Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Any:
        if past_key_values is not None:
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(nothing, nothing, self.index)
        return (hidden_states,) if self.as_tuple else hidden_states


def skeleton(file: GGUFFile, config: Any) -> Any:
    """transformers' model for `config` with its buffers made and no parameters."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # SDPA knows no soft cap on attention scores.
    eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    try:
        with no_init_weights(), _parameters_on_meta(), redirect_stdout(sys.stderr):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise Unsupported(file.path, f"transformers cannot build it: {error}") from error
    return model.eval()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside get parameters without memory, but real buffers (rotary frequencies, for one)."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    with _replaced(nn.Module, "register_parameter", on_meta):
        yield


def layers_of(file: GGUFFile, base: nn.Module, n_blocks: int) -> nn.ModuleList:
    found = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == n_blocks]
    if not found:
        raise Unsupported(file.path, "its blocks are not in one list")
    return found[0]
