"""transformers' own model of a GGUF file without its weights: the frame that blocks are put into, and their names."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, cached_property
from typing import Any

import gguf
import torch
from torch import nn

from agentd.errors import TrainerFailed
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.model_config import config_values, per_block_inputs
from agentd.nn.structure import block_list
from agentd.nn.tensor_map import Array, TensorMap

_THEIRS = (
    "bloom",
    "falcon",
    "gpt-oss",
    "gpt2",
    "gpt_oss",
    "mamba",
    "minimax-m2",
    "nemotron",
    "stablelm",
    "t5",
    "t5encoder",
)
"""Architectures left to transformers' own loader: it knows how each of them stores what no rule here says."""


class Unsupported(TrainerFailed):
    """This model cannot be built here; it can still be trained with forward passes alone (k = 0)."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"backpropagation is not available for {path}: {reason}")
        self.reason = reason


def read_config(file: GGUFFile) -> tuple[Any, dict[str, Any]]:
    """transformers' configuration of the model, and the raw values it was made of. Raises Unsupported."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if file.header.architecture in _THEIRS:
            from transformers import modeling_gguf_pytorch_utils as loader

            with _replaced(gguf, "GGUFReader", lambda _: file.reader()):
                values = loader.load_gguf_checkpoint(str(file.path), return_tensors=False)["config"]
        else:
            values = config_values(file.path, file.header, CONFIG_MAPPING)
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        raise Unsupported(file.path, f"architecture {file.header.architecture!r}: {error}") from error
    return config, values


class _LoaderMap:
    """What transformers' loader makes of a GGUF file's tensors; the interface is TensorMap's."""

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
        """See TensorMap."""
        converted = self._processor.process(
            weights=stored, name=tensor, tensor_key_mapping=self.names, parsed_parameters={"tensors": parts}
        )
        return None if converted.name not in self.names else (self.names[converted.name], converted.weights)


def tensor_map(file: GGUFFile, model: nn.Module, config: Any, values: dict[str, Any]) -> TensorMap | _LoaderMap:
    """Where the file's tensors belong in `model`; the rest is what read_config gave. Raises Unsupported."""
    if file.header.architecture in _THEIRS:
        return _LoaderMap(file, model, values)
    return TensorMap(file, model, config)


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
        if per_block_inputs(file.tensors):
            reason = "its blocks take an embedding of the token each, besides the hidden states that are tapped"
            raise Unsupported(file.path, reason)
        self.config, self._values = read_config(file)
        self.n_blocks = int(self.config.num_hidden_layers)
        try:
            with _parameters_on_meta(), redirect_stdout(sys.stderr):
                self.module: Any = build(self.config, torch.float32)
            scale_rope(file, self.module)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise Unsupported(file.path, f"transformers cannot build it: {error}") from error
        try:
            self.blocks = block_list(self.module.base_model, self.n_blocks)
        except ValueError:
            raise Unsupported(file.path, "its blocks are not in one list") from None

    @cached_property
    def tensors(self) -> TensorMap | _LoaderMap:
        return tensor_map(self._file, self.module, self.config, self._values)


def scale_rope(file: GGUFFile, model: nn.Module) -> None:
    """Divides rope's frequencies by the file's factors: those of Llama 3, or the short ones of LongRoPE (the engine
    takes the long ones beyond the context that the model was first trained for)."""
    name = next((n for n in ("rope_freqs.weight", "rope_factors_short.weight") if n in file.tensors), None)
    if name is None:
        return
    factors = file.load(name)
    attention = file.header.metadata.get(f"{file.header.architecture}.rope.scaling.attn_factor")
    for module in model.modules():
        frequencies = module._buffers.get("inv_freq")
        if frequencies is not None and frequencies.shape == factors.shape:
            module._buffers["inv_freq"] = frequencies / factors
            if attention is not None:
                module.attention_scaling = attention


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
