"""transformers' own model of a GGUF file without its weights: the frame that blocks are put into, and their names."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, cached_property
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agentd.errors import TrainerFailed
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.structure import block_list

Array = NDArray[np.float32]


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


class TensorMap:
    """What transformers makes of a GGUF file's tensors in `model`: `names` has its own name of each."""

    def __init__(self, file: GGUFFile, model: nn.Module, values: dict[str, Any]) -> None:
        """`values` are read_config's. Raises Unsupported."""
        from transformers import modeling_gguf_pytorch_utils as loader

        self._processor = loader.TENSOR_PROCESSORS.get(file.header.architecture, loader.TensorProcessor)(config=values)
        try:
            # The loader asks gguf for the same table of names once per module: seconds, where one look is enough.
            with _replaced(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)):
                self.names: dict[str, str] = loader.get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise Unsupported(file.path, str(error)) from error

    def convert(self, tensor: str, stored: Array, parts: dict[str, torch.Tensor]) -> tuple[str, Array] | None:
        """transformers' name for a tensor and its weights as torch holds them: `stored` itself where they are the same.

        None if it has no name of its own there, because several of the file's make one of transformers', or one makes
        several (experts); what it contributes to is put into `parts`.
        """
        converted = self._processor.process(
            weights=stored, name=tensor, tensor_key_mapping=self.names, parsed_parameters={"tensors": parts}
        )
        return None if converted.name not in self.names else (self.names[converted.name], converted.weights)


class IdentityBlock(nn.Module):
    """Stands in for a block outside the range: its output is its input.

    It keeps the block's plain attributes: models ask blocks for their attention type.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for key, value in vars(block).items():
            if not key.startswith("_") and key != "training" and not isinstance(value, torch.Tensor):
                self.__dict__.setdefault(key, value)
        self.as_tuple = False

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


class MetaModel:
    """transformers' model of a GGUF file with its buffers made and no parameters. Raises Unsupported."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.config, self._values = read_config(file)
        self.n_blocks = int(self.config.num_hidden_layers)
        try:
            with _parameters_on_meta(), redirect_stdout(sys.stderr):
                self.module: Any = build(self.config, torch.float32)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise Unsupported(file.path, f"transformers cannot build it: {error}") from error
        try:
            self.blocks = block_list(self.module.base_model, self.n_blocks)
        except ValueError:
            raise Unsupported(file.path, "its blocks are not in one list") from None

    @cached_property
    def tensors(self) -> TensorMap:
        return TensorMap(self._file, self.module, self._values)


def build(config: Any, dtype: torch.dtype) -> Any:
    """transformers' causal language model for `config`, its weights not initialised."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # SDPA knows no soft cap on attention scores.
    eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **eager)
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
