"""A contiguous range of a model's blocks in torch, built from its GGUF with transformers' own modules.

transformers' model runs as it is, on the tapped input, with every block outside the range replaced by one that passes
its input on: attention masks, rotary embeddings, layer types and sliding windows then come from transformers. Only
the range's tensors and the final norm are dequantised; the embedding and the head never become float32 matrices.

Anything this file assumes of an architecture is checked on the model itself when it is built, with random input.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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
        names: dict[str, str] = loader.get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise Unsupported(file.path, str(error)) from error
    return processor, names


class Blocks:
    """Blocks [first, end) of the model in `file`, their weights frozen, in float32.

    control  per block index a vector of n_embd that is added to that block's output (llama.cpp's control vector)

    After construction:
    linears  per GGUF tensor name, (owner module, attribute) of every linear layer stored as torch holds it
    norm     the final norm
    """

    def __init__(
        self,
        file: GGUFFile,
        first: int,
        end: int,
        control: dict[int, torch.Tensor] | None = None,
        checkpoint: bool = False,
    ) -> None:
        self.file = file
        self.config, values = read_config(file)
        self.n_blocks, self.n_embd = int(self.config.num_hidden_layers), int(self.config.hidden_size)
        if not 0 <= first < end <= self.n_blocks:
            raise TrainerFailed(f"there are no blocks {first} to {end - 1} in a model of {self.n_blocks} blocks")
        self.first, self.end = first, end
        self.model = skeleton(file, self.config)
        self.base: nn.Module = self.model.base_model
        layers = layers_of(file, self.base, self.n_blocks)
        for i in range(self.n_blocks):
            if not first <= i < end:
                layers[i] = PassedOn(layers[i], i)
        self._layers = layers
        self.linears: dict[str, tuple[nn.Module, str]] = {}
        self.norm = self._load(values)
        for i in range(first, end):
            if control and i in control:
                _add_to_output(layers[i], control[i])
            if checkpoint:
                _recompute(layers[i])
        self.entry = 1.0
        self._check_ends()

    @property
    def last(self) -> nn.Module:
        """The last block of the range."""
        return self._layers[self.end - 1]

    def set(self, linear: tuple[nn.Module, str], module: nn.Module) -> None:
        setattr(*linear, module)

    def run(self, inputs: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """The range's output (sequences, tokens, n_embd) for its input of the same shape, before the final norm."""
        scaled = inputs if self.entry == 1.0 else inputs * self.entry
        output = self.base(inputs_embeds=scaled, past_key_values=cache, use_cache=cache is not None)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _load(self, values: dict[str, Any]) -> nn.Module:
        """Dequantises what the range needs into the skeleton, and takes the final norm out of it."""
        processor, names = tensor_names(self.file, self.model, values)
        wanted = {f"blk.{i}." for i in range(self.first, self.end)} | {"output_norm."}
        loaded: dict[str, Any] = {}
        for tensor in self.file.tensors:
            if not tensor.startswith(tuple(wanted)):
                continue
            weights = self.file.load(tensor).numpy()
            made = processor.process(
                weights=weights, name=tensor, tensor_key_mapping=names, parsed_parameters={"tensors": loaded}
            )
            if made.name is None or made.name not in names:
                continue
            name = names[made.name]
            loaded[name] = torch.from_numpy(made.weights)
            path, _, leaf = name.rpartition(".")
            # Rows that the loader reorders would need the LoRA matrices reordered too, so these stay without.
            if leaf == "weight" and made.weights is weights and isinstance(self.model.get_submodule(path), nn.Linear):
                owner, _, attribute = path.rpartition(".")
                self.linears[tensor] = (self.model.get_submodule(owner), attribute)
        self.file.forget()
        for name, tensor in loaded.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            place = module._parameters if leaf in module._parameters else module._buffers
            expected = place.get(leaf)
            if expected is None or expected.shape != tensor.shape:
                shape = None if expected is None else tuple(expected.shape)
                raise Unsupported(self.file.path, f"{name} has the shape {tuple(tensor.shape)}, expected {shape}")
            place[leaf] = nn.Parameter(tensor, requires_grad=False) if place is module._parameters else tensor
        if "output_norm.weight" not in names:
            raise Unsupported(self.file.path, "no final norm is known for its architecture")
        norm_path = names["output_norm.weight"].rpartition(".")[0]
        norm: nn.Module = self.model.get_submodule(norm_path)
        owner, _, attribute = norm_path.rpartition(".")
        setattr(self.model.get_submodule(owner), attribute, nn.Identity())
        for part in (*(self._layers[i] for i in range(self.first, self.end)), norm):
            for name, value in (*part.named_parameters(), *part.named_buffers()):
                if value.is_meta:
                    raise Unsupported(self.file.path, f"the file has no tensor for {name}")
        norm.requires_grad_(False)
        return norm

    def _check_ends(self) -> None:
        """Finds out how the model passes its input to the blocks, and that it passes their output on unchanged."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2, 5, self.n_embd, generator=generator)
        seen: dict[str, torch.Tensor] = {}

        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            seen["out"] = output[0] if isinstance(output, tuple) else output

        hooks = [
            self._layers[self.first].register_forward_pre_hook(entering, with_kwargs=True),
            self.last.register_forward_hook(leaving),
        ]
        problem = "it runs its blocks in a way that is not known here"
        try:
            for as_tuple in (False, True):
                for layer in self._layers:
                    if isinstance(layer, PassedOn):
                        layer.as_tuple = as_tuple
                seen.clear()
                try:
                    with torch.no_grad():
                        output = self.run(inputs)
                except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
                    problem = f"{type(error).__name__}: {error}"
                    continue
                if seen["in"].shape != inputs.shape or not torch.equal(seen["out"], output):
                    continue
                # Some models scale embeddings on their way in; the tap was taken after that.
                factor = (seen["in"] / inputs).flatten()
                if torch.allclose(factor, factor.mean(), rtol=1e-3):
                    scale = factor.mean().item()
                    self.entry = 1.0 if abs(scale - 1) < 1e-6 else 1 / scale
                    return
        finally:
            for hook in hooks:
                hook.remove()
        raise Unsupported(self.file.path, problem)


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


def _add_to_output(block: nn.Module, vector: torch.Tensor) -> None:
    def add(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    block.register_forward_hook(add)


class _Recompute(torch.autograd.Function):
    """Runs a block without keeping anything but its input, and again, with autograd, when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, run: Any, hidden: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.hidden = run, hidden.detach()
        output: torch.Tensor = run(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        hidden = ctx.hidden.requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad():
            output = ctx.run(hidden)
        torch.autograd.backward(output, gradients[0])
        return None, hidden.grad, None


def _recompute(block: nn.Module) -> None:
    plain = block.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(hidden_states, *args, **kwargs)
        tuples: list[bool] = []

        def run(hidden: torch.Tensor) -> torch.Tensor:
            output = plain(hidden, *args, **kwargs)
            tuples.append(isinstance(output, tuple))
            hidden = output[0] if tuples[-1] else output
            assert isinstance(hidden, torch.Tensor)
            return hidden

        # Without an input that requires a gradient autograd would not come back for the matrices inside.
        anchor = torch.zeros((), requires_grad=True)
        hidden = _Recompute.apply(run, hidden_states, anchor)  # type: ignore[no-untyped-call]
        return (hidden,) if tuples[0] else hidden

    block.forward = forward
